"""A training step as two recorded graphs of kernels, for batches of one shape that come again and again.

A layer makes some sixty launches, there and back, and what they cost the host is more than what they cost the GPU while
a batch has few tokens. A recorded graph (CUDA graphs) is one launch. It computes what the layers compute, by the same
kernels in the same order, on the same parameters; its input is copied into its memory, and the gradients out of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ft_core.fast.recording import as_it_was, recording_stream

__all__ = ["Graphs"]

AFTER = 3
"""Steps of one shape before it is recorded: these compile, choose and allocate whatever the kernels need."""
SHARE = 0.5
"""The share of the free memory that a recorded step may keep for itself."""
MOST = 8
"""Recordings of a model; where shapes change as often as that, they are no gain."""


class Graphs:
    """What was recorded of one model's training step.

    Attributes:
        on: whether steps are recorded and replayed; while it is False, each is computed kernel by kernel.
        recorded: how often one was recorded.
        reason: why none is recorded any more, or None.
    """

    def __init__(self) -> None:
        self.on, self.recorded = True, 0
        self.reason: str | None = None
        self._key: Any = None
        self._kept: Any = None
        self._shapes: Any = None
        self._seen = 0
        self._step: _Step | None = None

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()  # a recording reads and writes the memory of its own model

    @property
    def replays(self) -> bool:
        """Whether the last step's shape is recorded."""
        return self._step is not None

    def loss(
        self,
        compute: Callable[..., Tensor],
        given: Mapping[str, Tensor],
        look: Callable[[], tuple[Any, Any] | None],
        model: nn.Module,
    ) -> Tensor | None:
        """The loss with a graph to the parameters, replayed; None where the caller has to compute it.

        Args:
            compute: the loss of ``given``, on the GPU, without waiting for it.
            given: what changes from step to step, on the GPU.
            look: gives all else that the loss depends on and that is no number in a parameter, to be compared, and what
                must live as long as that is; None where a step cannot be recorded. It may take its time: meanwhile the
                GPU computes the step recorded for these shapes, which is thrown away if it isn't the one.
            model: whose parameters may get a gradient.
        """
        if not self.on or self.reason is not None or torch.cuda.is_current_stream_capturing():
            return None
        device = next(iter(given.values())).device
        generator = torch.cuda.default_generators[device.index]
        shapes = tuple((name, t.shape, t.dtype, t.device) for name, t in given.items())
        before, begun = generator.get_offset(), None
        if self._step is not None and shapes == self._shapes and self._step.stands() and not self._step.waits():
            begun = self._step(given)
        found = look()
        key, kept = found if found is not None else (None, None)
        if begun is not None and key == self._key:
            return begun
        if begun is not None:
            generator.set_offset(before)  # its random numbers are the next step's
        if key is None or key != self._key or shapes != self._shapes:
            self._key, self._kept, self._shapes, self._seen, self._step = key, kept, shapes, 0, None
        if key is None:
            return None
        self._seen += 1
        if self._step is None:
            if self._seen <= AFTER:
                return None
            if self.recorded == MOST or not _fits(device):
                self.reason = "shapes change too often" if self.recorded == MOST else "too little memory is free"
                return None
            self.recorded += 1
            self._step = self._record(compute, given, model, device)
            if self._step is None:
                return None
        return None if self._step.waits() else self._step(given)

    def _record(
        self, compute: Callable[..., Tensor], given: Mapping[str, Tensor], model: nn.Module, device: torch.device
    ) -> _Step | None:
        try:
            with torch.cuda.device(device), as_it_was(device):
                return _Step(compute, given, model)
        except Exception as error:
            # Something waited for the GPU, say. The layers can still be computed kernel by kernel.
            self.reason = f"{type(error).__name__}: {error}"
            return None


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The trained parameters, and tensors of the same memory that stand in their places for a while.

    A parameter's gradient is handed over on the stream on which it was first used, as long as any loss from then is
    alive, and on that stream nothing is recorded.
    """
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    others = {id(p): p.detach().requires_grad_() for _, _, p in places if p.requires_grad}
    changed = [(m, name, p) for m, name, p in places if id(p) in others]
    try:
        for module, name, parameter in changed:
            module._parameters[name] = others[id(parameter)]  # type: ignore[assignment]
        known = {id(p): p for _, _, p in changed}
        yield list(known.values()), [others[key] for key in known]
    finally:
        for module, name, parameter in changed:
            module._parameters[name] = parameter


def _fits(device: torch.device) -> bool:
    """Whether a step's memory, which a recording keeps for itself, is a small enough part of what is free."""
    stats = torch.cuda.memory_stats(device)
    needed = stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
    cached = stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]
    return bool(needed <= SHARE * (torch.cuda.mem_get_info(device)[0] + cached))


class _Turn:
    """One use of a recorded forward pass, whose activations wait for its backward pass."""

    done = False


class _Step:
    """A recorded forward and backward pass."""

    def __init__(self, compute: Callable[..., Tensor], given: Mapping[str, Tensor], model: nn.Module) -> None:
        self.given = {name: t.detach().clone() for name, t in given.items()}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._turn: Callable[[], _Turn | None] = lambda: None
        pool, stream = torch.cuda.graph_pool_handle(), recording_stream(next(iter(given.values())).device)
        # Threads that load data may allocate meanwhile. A cast that autocast keeps would lie in the graph's memory.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with (
            torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False),
            _stand_ins(model) as (self.parameters, stand_ins),
        ):
            with torch.cuda.graph(self.forward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                loss = compute(**self.given)
            self.up = torch.ones_like(loss)
            with torch.cuda.graph(self.backward, pool=pool, stream=stream, capture_error_mode="thread_local"):
                grads = torch.autograd.grad(loss, stand_ins, self.up, allow_unused=True)
                self.dtypes = sorted({g.dtype for g in grads if g is not None}, key=str)
                self.flats = [torch.cat([g.flatten() for g in grads if g is not None and g.dtype == d])
                              for d in self.dtypes]  # fmt: skip
        self.places = [(p, p.data_ptr(), p.requires_grad) for p in model.parameters()]
        self.known = [None if g is None else self.dtypes.index(g.dtype) for g in grads]
        self.result = loss.detach()

    def stands(self) -> bool:
        """Whether the parameters it was recorded with lie where they did."""
        return all(p.data_ptr() == place and p.requires_grad == trained for p, place, trained in self.places)

    def waits(self) -> bool:
        """Whether a backward pass through the last use may still come."""
        turn = self._turn()
        return turn is not None and not turn.done

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        for name, tensor in given.items():
            self.given[name].copy_(tensor)
        turn = _Turn()
        self._turn = weakref.ref(turn)
        loss: Tensor = _Replay.apply(self, turn, *self.parameters)  # type: ignore[no-untyped-call]
        return loss

    def gradients(self) -> list[Tensor | None]:
        """Each parameter's, in memory that the next replay does not write."""
        copies = [flat.clone() for flat in self.flats]
        sizes: list[list[int]] = [[] for _ in copies]
        for parameter, kind in zip(self.parameters, self.known, strict=True):
            if kind is not None:
                sizes[kind].append(parameter.numel())
        parts = [iter(copy.split(size)) for copy, size in zip(copies, sizes, strict=True)]
        return [
            None if kind is None else next(parts[kind]).view(parameter.shape)
            for parameter, kind in zip(self.parameters, self.known, strict=True)
        ]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, turn: _Turn, *parameters: Tensor) -> Tensor:
        step.forward.replay()
        ctx.step, ctx.turn = step, turn
        return step.result.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn.done:
            raise RuntimeError(
                "backward was called a second time on a loss of the fast layers, which write gradients over what "
                "forward kept; compute the loss again, or add losses up before one backward"
            )
        step: _Step = ctx.step
        step.up.copy_(up)
        step.backward.replay()
        ctx.turn.done = True
        return None, None, *step.gradients()
