"""A function's autograd graph that holds no memory of its own.

What the function saves for its backward is handed to the caller instead, who keeps it together with its own: hooks that
offload or recompute then see each tensor once. A tensor that lies in memory which the caller knows (an input, the
output) is kept as a place in there, so that the caller is free to drop that memory and to make it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

__all__ = ["Recorded", "record"]


class _Source(torch.autograd.Function):
    """Where the graph begins. The inputs themselves as leaves would be held by it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in inputs)


@dataclass(frozen=True)
class _Place:
    """A tensor in the memory of the known tensor ``index``, from so many elements after its first one."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class Recorded:
    """A graph from an output to its inputs.

    Attributes:
        inputs, output: edges of the graph.
        saved: for each saved tensor, in order: where it lies in known memory, or its number among the kept.
        present: what backward reads, while it runs.
    """

    inputs: list[GradientEdge]
    output: GradientEdge
    saved: list[_Place | int]
    present: list[tuple[Sequence[Tensor | None], Sequence[Tensor]]]

    def backward(self, grad: Tensor, known: Sequence[Tensor | None], kept: Sequence[Tensor]) -> list[Tensor | None]:
        """The inputs' gradients; None where the output does not depend on one.

        Args:
            known: the same numbers in the same layout as at recording. kept: as :func:`record` gave them.
        """
        self.present.append((known, kept))
        try:
            return list(torch.autograd.grad([self.output], self.inputs, [grad], allow_unused=True))
        finally:
            self.present.clear()


def _place(t: Tensor, known: Sequence[Tensor]) -> _Place | None:
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    for index, memory in enumerate(known):
        offset = int(t.storage_offset() - memory.storage_offset())
        same = t.dtype == memory.dtype and t.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        if same and offset >= 0 and offset + extent <= memory.numel():
            return _Place(index, tuple(t.shape), t.stride(), offset)
    return None


def record(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], known: Sequence[Tensor]
) -> tuple[Tensor, Recorded, list[Tensor]]:
    """Run the function and give its output (outside the graph), the graph, and what must be kept for backward.

    Args:
        known: contiguous memory that will be there in backward. The output, if contiguous, is one more of these.
    """
    taken: list[Tensor] = []
    saved: list[_Place | int] = []
    present: list[tuple[Sequence[Tensor | None], Sequence[Tensor]]] = []

    def pack(t: Tensor) -> int:
        taken.append(t.detach())
        return len(taken) - 1

    def unpack(number: int) -> Tensor:
        if not present:
            raise RuntimeError("attention_block: the attention's graph is used outside of the block's own backward")
        memory, kept = present[0]
        place = saved[number]
        if isinstance(place, int):
            return kept[place]
        base = memory[place.index]
        assert base is not None
        return base.as_strided(place.shape, place.stride, base.storage_offset() + place.offset)

    anchor = torch.empty(0, device=inputs[0].device, requires_grad=True)
    with torch.enable_grad():
        sources: tuple[Tensor, ...] = _Source.apply(anchor, *inputs)  # type: ignore[no-untyped-call]
        with saved_tensors_hooks(pack, unpack):
            output = function(*sources)
    if output.grad_fn is None:
        raise RuntimeError("attention_block: attention gave a tensor without a graph; compute it from q, k and v")
    result = output.detach()
    kept: list[Tensor] = []
    for t in taken:
        place = _place(t, [*known, result] if result.is_contiguous() else known)
        saved.append(len(kept) if place is None else place)
        if place is None:
            kept.append(t)
    taken.clear()  # the hooks live as long as the graph
    return result, Recorded([get_gradient_edge(t) for t in sources], get_gradient_edge(output), saved, present), kept
