"""A layer of which its input alone waits for backward, computed again there, a part of the batch at a time.

The sequences of a batch do not see each other within a layer, so that what it takes beside its input and its output is
that of one part. To autograd it is one operation, as in :mod:`ft_core.fast.again`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["computed_again"]

Compute = Callable[..., Tensor]


def computed_again(
    compute: Compute, x: Tensor, heard: Tensor | None, trained: Sequence[Tensor], pieces: int = 1
) -> Tensor:
    """``compute(x, heard)``, of which x and heard are kept.

    Args:
        compute: from ``[B, S, H]``, and ``[B, T, H]`` or None, to ``[B, S, H]``; the rows of a batch are independent.
        trained: all that it differentiates beside these.
        pieces: in how many parts the batch is computed, as far as it can be divided.
    """
    if not (x.requires_grad or trained or (heard is not None and heard.requires_grad)):
        return compute(x, heard)
    out: Tensor = _Again.apply(compute, pieces, x, heard, *trained)  # type: ignore[no-untyped-call]
    return out


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, pieces: int, x: Tensor, heard: Tensor | None, *trained: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.compute, ctx.pieces = compute, pieces
        ctx.state = _State(x.device)
        # All decoder layers hear the same: it is no activation of this one, which might be taken to the host.
        ctx.heard = None if heard is None else heard.detach()
        ctx.save_for_backward(x, *trained)
        out = torch.empty_like(x)
        # With a graph, whose tensors are dropped as it is made: without one, the attention could be another kernel.
        with torch.enable_grad(), saved_tensors_hooks(_drop, _never):
            for part, target in zip(_parts(x, heard, pieces), out.chunk(pieces), strict=True):
                mine, listened = (None if t is None else t.detach().requires_grad_() for t in part)
                target.copy_(compute(mine, listened).detach())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *trained = ctx.saved_tensors
        _, _, need_x, need_heard, *needs = ctx.needs_input_grad
        heard: Tensor | None = ctx.heard
        dx = torch.empty_like(x) if need_x else None
        dheard = torch.empty_like(heard) if need_heard and heard is not None else None
        wanted = [p for p, need in zip(trained, needs, strict=True) if need]
        sums: list[Tensor | None] = [None] * len(wanted)
        with ctx.state.again():
            for number, (part, up) in enumerate(zip(_parts(x, heard, ctx.pieces), dy.chunk(ctx.pieces), strict=True)):
                mine = part[0].detach().requires_grad_(need_x)
                listened = None if part[1] is None else part[1].detach().requires_grad_(need_heard)
                with torch.enable_grad():
                    y = ctx.compute(mine, listened)
                inputs = [t for t in (mine, listened) if t is not None and t.requires_grad]
                made = list(torch.autograd.grad(y, [*inputs, *wanted], up, allow_unused=True))
                del y
                for target in (t for t in (dx, dheard) if t is not None):
                    found = made.pop(0)
                    here = target.chunk(ctx.pieces)[number]
                    here.zero_() if found is None else here.copy_(found)
                sums = [_sum(one, two) for one, two in zip(sums, made, strict=True)]
        found_sums = iter(sums)
        return None, None, dx, dheard, *(next(found_sums) if need else None for need in needs)


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one.add_(two)


def _parts(x: Tensor, heard: Tensor | None, pieces: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    parts = x.chunk(pieces)  # of a batch that cannot be divided so, fewer
    others: Sequence[Tensor | None] = [None] * len(parts) if heard is None else heard.chunk(pieces)
    return zip(parts, others, strict=True)


def _drop(tensor: Tensor) -> None:
    return None


def _never(packed: None) -> Tensor:
    raise RuntimeError("the graph of a layer's first computation is used; it is computed again for backward")


class _State:
    """Random numbers and autocast as they are now. While a graph is recorded, its random numbers go on by themselves:
    those of backward would be others, so that nothing that draws any may be recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._cpu = None if recorded else torch.get_rng_state()
        self._own = torch.cuda.get_rng_state(device) if device.type == "cuda" and not recorded else None
        self._dtype = torch.get_autocast_dtype(device.type)
        self._enabled = torch.is_autocast_enabled(device.type)
        self._cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The body runs in that state, and leaves the state of now as it is."""
        with torch.autocast(self._device.type, self._dtype, self._enabled, self._cache):
            if self._cpu is None:
                yield
                return
            with torch.random.fork_rng([] if self._own is None else [self._device]):
                torch.set_rng_state(self._cpu)
                if self._own is not None:
                    torch.cuda.set_rng_state(self._own, self._device)
                yield
