"""Kept keys and values of some sequences, and the step that writes one more token of each.

A step makes some four hundred launches, and what they cost the host is several times what they cost the GPU. On a GPU
it is therefore recorded once, as a graph of kernels (CUDA graphs), and replayed for every token: where a sequence
stands is in the device's memory, and nothing in a step depends on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import ft_kernels as kernels
from ft_core.fast.decoding.layers import Layers
from ft_core.fast.layout import Layout
from ft_core.fast.recording import as_it_was, recording_stream
from ft_kernels.ops.packed_attention.choose import PLANNED, case_of, why_not

__all__ = ["Session", "bytes_of"]

SHORT = 4
"""Steps that are left from which recording pays; it takes about as long as three of them."""


def bytes_of(layout: Layout, layers: int, rows: int, slots: int, dtype: torch.dtype) -> int:
    """The memory of a session's keys and values."""
    return 2 * layers * rows * slots * layout.kv_heads * layout.head_dim * dtype.itemsize


class Session:
    """Room for ``rows`` sequences of up to ``slots`` tokens.

    Attributes:
        tokens: ``[rows]``, int64, the last token of each sequence, whose key and value are not yet kept.
        lengths: ``[rows]``, int32, how many tokens are kept.
        reason: why no step can be recorded, or None.
    """

    @torch.inference_mode()
    def __init__(self, layers: Layers, rows: int, slots: int) -> None:
        self.layers, self.rows, self.slots = layers, rows, slots
        layout, device = layers.layout, layers.device
        shape = (len(layers.layers), 2, rows * slots, layout.kv_heads, layout.head_dim)
        with _on(device):
            self.kept = torch.zeros(shape, dtype=layers.dtype, device=device)
            self.cos, self.sin = layers.angles(slots)
            self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
            self.begins = torch.arange(rows, device=device) * slots
        self.reason: str | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._warm = False

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._graph is not None

    @torch.inference_mode()
    def begin(self, prompts: Sequence[Sequence[int]], copies: int = 1) -> Tensor:
        """Read prompts, and give the logits that follow, ``[prompts · copies, V]``.

        Args:
            prompts: token ids, none empty. copies: how many of the sequences, which may be fewer than rows, begin with
                each: they stand together, and the prompt is read once.
        """
        layers, device = self.layers, self.layers.device
        counts = [len(prompt) for prompt in prompts]
        flat = [token for prompt in prompts for token in prompt]
        places = [i for count in counts for i in range(count)]
        slots = [row * copies * self.slots + i for row, count in enumerate(counts) for i in range(count)]
        with _on(device):
            ids, positions, where = torch.tensor([flat, places, slots], dtype=torch.int64).to(device)
            plan = kernels.plan_attention(lengths=counts)
            backend = _backend(layers, counts)

            def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                layer, (keys, values) = layers.layers[number], self.kept[number]
                q, k = self._turned(q, k, positions)
                keys.index_copy_(0, where, k)
                values.index_copy_(0, where, v)
                return kernels.packed_attention(
                    q, k, v, plan=plan, window=layer.window, scale=layer.scale, backend=backend
                )

            hidden = layers(ids, attend, few=False)
            rows = [count for count in counts for _ in range(copies)]
            self.lengths.copy_(torch.tensor(rows + [0] * (self.rows - len(rows)), dtype=torch.int32))
            self.tokens.zero_()
            if copies > 1:
                kept = self.kept.view(*self.kept.shape[:2], self.rows, self.slots, *self.kept.shape[3:])
                for i, count in enumerate(counts):
                    kept[:, :, i * copies + 1 : (i + 1) * copies, :count] = kept[:, :, i * copies, None, :count]
            lasts = torch.tensor(counts).cumsum(0).to(device) - 1
            logits: Tensor = layers.head(hidden[lasts], False)
            return logits.repeat_interleave(copies, 0) if copies > 1 else logits

    @torch.inference_mode()
    def follow(self, tokens: Tensor, left: int) -> Tensor:
        """Logits ``[rows, V]`` after one more token of each sequence; the next call may write over them.

        Args:
            tokens: ``[n]``, n at most rows: the sequences' new tokens.
            left: how many more steps are expected, this one included.
        """
        with _on(self.layers.device):
            self.tokens[: tokens.shape[0]] = tokens
            if self._graph is None and self._warm and self.reason is None and left >= SHORT:
                self._record()
            if self._graph is not None and self._logits is not None:
                self._graph.replay()
                return self._logits
            self._warm = self.layers.device.type == "cuda"  # kernels are compiled now, and may be recorded
            return self._step()

    def _step(self) -> Tensor:
        positions = self.lengths.clone()
        self.lengths.add_(1)
        shape = (self.rows, self.slots, *self.kept.shape[3:])
        layout = self.layers.layout
        at_once = layout.attention.rotary == "half" and self.cos.shape[1] == layout.head_dim
        where = positions if at_once else self.begins + positions

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = self.layers.layers[number]
            keys, values = (kept.view(shape) for kept in self.kept[number])
            if at_once:
                q = kernels.rope_append(q, k, v, keys, values, positions, self.cos, self.sin)
            else:
                q, k = self._turned(q, k, positions)
                self.kept[number, 0].index_copy_(0, where, k)
                self.kept[number, 1].index_copy_(0, where, v)
            return kernels.decode_attention(q, keys, values, self.lengths, window=layer.window, scale=layer.scale)

        return self.layers.head(self.layers(self.tokens, attend, few=True), True)

    def _turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        layout = self.layers.layout
        return kernels.rope(
            q, k, self.cos, self.sin, position_ids=positions, layout=layout.attention.rotary,
            rotary_dim=self.cos.shape[1],
        )  # fmt: skip

    def _record(self) -> None:
        device = self.layers.device
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                as_it_was(device),
                torch.cuda.graph(graph, stream=recording_stream(device), capture_error_mode="thread_local"),
            ):
                self._logits = self._step()
            self._graph = graph
        except Exception as error:  # something waited for the GPU, say: the step is still computed kernel by kernel
            self.reason = f"{type(error).__name__}: {error}"
            self._logits = None


def _backend(layers: Layers, counts: Sequence[int]) -> Any:
    """Attention over prompts: our own kernel where it can be, cuDNN where one is long.

    Their lengths won't come again: flex attention would be compiled first, and cuDNN plans anew for each length, which
    both take longer than reading most prompts.
    """
    layout = layers.layout
    q = torch.empty(0, layout.heads, layout.head_dim, dtype=layers.dtype, device=layers.device)
    windows = any(layer.window is not None for layer in layers.layers)
    equal = len(set(counts)) == 1
    case = case_of(q, max_length=max(counts), equal=equal, window=windows)
    if layers.device.type != "cuda" or why_not("triton", case) is not None:
        return "auto"
    return "dense" if max(counts) >= PLANNED and why_not("dense", case) is None else "triton"


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
