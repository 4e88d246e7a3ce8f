"""A training step as two recorded graphs of kernels, for batches of shapes that come again and again.

A layer makes some sixty launches, there and back, and what they cost the host is more than what they cost the GPU while
a batch has few tokens. A recorded graph (CUDA graphs) is one launch. It computes what the layers compute, by the same
kernels in the same order, on the same parameters; its input is copied into its memory, and the gradients out of it.

The recordings of a model, one for each shape, share their memory: only one step is under way at a time. The longest is
recorded first, since what a shorter one takes is cut from a longer one's memory, and never the other way round.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ft_core.fast.recording import as_it_was, recording_stream

__all__ = ["Graphs", "Pace"]

AFTER = 3
"""Steps of one shape before it is recorded: these compile, choose and allocate whatever the kernels need."""
SHARE = 0.5
"""The share of the free memory that a recorded step may keep for itself."""
MOST = 8
"""Recordings of a model at a time, each of a shape; steps of further shapes are computed kernel by kernel."""
MOST_IN_ALL = 48
"""Recordings of a model; where what they depend on changes as often as that, they are no gain."""
FAILURES = 3
"""Recordings that fail before no more is tried."""
SHAPES = 256
"""Shapes of which it is remembered how often they came."""


class Graphs:
    """What was recorded of one model's training step.

    Attributes:
        on: whether steps are recorded and replayed; while it is False, each is computed kernel by kernel.
        documents: whether rows of documents are, too.
        recorded: how often one was recorded.
        replays: whether the last step's shape is recorded.
        reason: why the last shape that was not recorded was not, or None. The others are replayed as before.
    """

    def __init__(self) -> None:
        self.on, self.recorded, self.replays = True, 0, False
        self.documents = True
        self.reason: str | None = None
        self._failed = 0
        self._key: Any = None
        self._kept: Any = None
        self._seen: dict[Any, int] = {}
        self._refused: set[Any] = set()
        self._steps: dict[Any, _Step] = {}
        self._shared: _Shared | None = None
        self._turn: weakref.ref[_Turn] | None = None

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()  # a recording reads and writes the memory of its own model

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def loss(
        self,
        compute: Callable[..., Tensor],
        given: Mapping[str, Tensor],
        look: Callable[[], tuple[Any, Any] | None],
        model: nn.Module,
        worth: Callable[[], bool] = lambda: True,
        fresh: bool = False,
    ) -> Tensor | None:
        """The loss with a graph to the parameters, replayed; None where the caller has to compute it.

        Args:
            compute: the loss of ``given``, on the GPU, without waiting for it.
            given: what changes from step to step, on the GPU.
            look: gives all else that the loss depends on and that is no number in a parameter, to be compared, and what
                must live as long as that is; None where a step cannot be recorded. It may take its time: meanwhile the
                GPU computes the step recorded for these shapes, which is thrown away if it isn't the one.
            model: whose parameters may get a gradient.
            worth: whether steps of this shape gain by being recorded; asked each time before one would be.
            fresh: whether the caller's own way is not by these shapes, so that their kernels may not be compiled yet.
        """
        self.replays = False
        if not self.on or torch.cuda.is_current_stream_capturing():
            return None
        device = next(iter(given.values())).device
        generator = torch.cuda.default_generators[device.index]
        shapes = tuple((name, t.shape, t.dtype, t.device) for name, t in given.items())
        before, begun = generator.get_offset(), None
        step = self._steps.get(shapes)
        if step is not None and step.stands() and not self._waits():
            begun = self._replay(step, given)
        found = look()
        key, kept = found if found is not None else (None, None)
        if begun is not None and key == self._key:
            self.replays = True
            return begun
        if begun is not None:
            begun = self._turn = None
            generator.set_offset(before)  # its random numbers are the next step's
        if key is None or key != self._key:
            self._key, self._kept = key, kept
            self.drop()
        if key is None:
            return None
        seen = self._seen.get(shapes, 0) + 1
        if shapes in self._seen or len(self._seen) < SHAPES:
            self._seen[shapes] = seen
        step = self._steps.get(shapes)
        if self._waits():
            return None  # its activations lie where another's would
        if step is None:
            if seen <= AFTER or shapes in self._refused or self._failed >= FAILURES or not worth():
                return None
            step = self._recorded(shapes, compute, given, model, device, fresh)
            if step is None:
                return None
        self.replays = True
        return self._replay(step, given)

    def drop(self) -> None:
        """Forget the recordings, and how often each shape came; their memory is torch's again."""
        self._steps.clear()
        self._seen.clear()
        self._shared = None  # a pool without a recording must not be recorded into

    def _waits(self) -> bool:
        """Whether a backward pass through the last use of a recording may still come."""
        turn = None if self._turn is None else self._turn()
        return turn is not None and not turn.done

    def _replay(self, step: _Step, given: Mapping[str, Tensor]) -> Tensor:
        turn = _Turn()
        self._turn = weakref.ref(turn)
        return step(given, turn)

    def _recorded(
        self, shapes: Hashable, compute: Callable[..., Tensor], given: Mapping[str, Tensor], model: nn.Module,
        device: torch.device, fresh: bool,
    ) -> _Step | None:  # fmt: skip
        size = max(t.numel() for t in given.values())
        longest = size > max((step.size for step in self._steps.values()), default=0)
        if not longest and len(self._steps) == MOST:
            return None
        if self.recorded == MOST_IN_ALL:
            self.reason = "what it depends on changes too often"
            return None
        if longest:
            if not _fits(device):
                self.reason = "too little memory is free"
                self._refused.add(shapes)
                return None
            self._steps.clear()  # they come again, and then find room in this one's memory
            self._shared = None
        self.recorded += 1
        step = self._record(compute, given, model, device, fresh)
        if step is None:
            self._refused.add(shapes)
            return None
        self._steps[shapes] = step
        return step

    def _record(
        self, compute: Callable[..., Tensor], given: Mapping[str, Tensor], model: nn.Module, device: torch.device,
        fresh: bool,
    ) -> _Step | None:  # fmt: skip
        try:
            with torch.cuda.device(device), as_it_was(device):
                if self._shared is None:
                    self._shared = _Shared()
                return _Step(compute, given, model, self._shared, fresh)
        except torch.OutOfMemoryError as error:
            self.reason = f"too little memory is free ({str(error).partition('.')[0]})"
        except Exception as error:
            # Something waited for the GPU, say. The layers can still be computed kernel by kernel.
            self.reason = f"{type(error).__name__}: {error}"
            self._failed += 1
        if not self._steps:
            self._shared = None
        return None


class _Shared:
    """What the recordings of a model have in common.

    Attributes:
        pool: their memory.
        flats: of each dtype, where gradients go.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.flats: dict[tuple[torch.dtype, int], Tensor] = {}

    def flat(self, grads: list[Tensor]) -> Tensor:
        """The gradients one after the other, in memory that is the same for each recording."""
        key = grads[0].dtype, sum(g.numel() for g in grads)
        parts = [g.flatten() for g in grads]
        if key in self.flats:
            torch.cat(parts, out=self.flats[key])
        else:
            self.flats[key] = torch.cat(parts)
        return self.flats[key]


class Pace:
    """Whether the host's launches take longer than what the GPU computes, found out by the steps themselves.

    The GPU's clock is read before and after the layers' forward pass is launched. If the GPU has more to do than the
    host, it falls behind: it has not begun when all is launched, or more time passes there than here.
    """

    def __init__(self) -> None:
        self._begun: tuple[torch.cuda.Event, float] | None = None
        self._measured: dict[Hashable, list[tuple[torch.cuda.Event, torch.cuda.Event, float]]] = {}

    def __deepcopy__(self, memo: Any) -> Pace:
        return Pace()

    def __reduce__(self) -> tuple[Any, ...]:
        return Pace, ()

    def begin(self, device: torch.device) -> None:
        """The layers' forward pass is about to be launched."""
        self._begun = None
        if not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            self._begun = event, time.perf_counter()

    def end(self, device: torch.device, what: Hashable) -> None:
        """It was launched; ``what`` it is like, and to be like again."""
        if self._begun is None:
            return
        begun, before = self._begun
        # A host that is so far ahead that it waits for room in the queue is no slower for that.
        host = time.perf_counter() - before if begun.query() else 0.0
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        known = self._measured.pop(what, [])
        self._measured[what] = [*known[-1:], (begun, event, host)]
        while len(self._measured) > SHAPES:
            self._measured.pop(next(iter(self._measured)))
        self._begun = None

    def by_host(self, what: Hashable) -> bool:
        """Whether the host set the pace in the last passes like this, as far as the GPU is done with them."""
        found = self._measured.get(what, ())
        done = [(one.elapsed_time(two) / 1e3, host) for one, two, host in found if one.query() and two.query()]
        return bool(done) and all(gpu <= BEHIND * host for gpu, host in done)


BEHIND = 1.2
"""How much longer a pass may take on the GPU than on the host and still be the host's."""


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
    # A recording begins with all of that given back, also what those had that make way for it.
    cached = stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]
    return bool(needed <= SHARE * (torch.cuda.mem_get_info(device)[0] + cached))


class _Turn:
    """One use of a recorded forward pass, whose activations wait for its backward pass."""

    done = False


class _Step:
    """A recorded forward and backward pass."""

    def __init__(
        self, compute: Callable[..., Tensor], given: Mapping[str, Tensor], model: nn.Module, shared: _Shared,
        fresh: bool,
    ) -> None:  # fmt: skip
        self.given = {name: t.detach().clone() for name, t in given.items()}
        self.size = max(t.numel() for t in given.values())
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = recording_stream(next(iter(given.values())).device)
        # Threads that load data may allocate meanwhile. A cast that autocast keeps would lie in the graph's memory.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        with (
            torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False),
            _stand_ins(model) as (self.parameters, stand_ins),
        ):
            if fresh:
                _try(compute, self.given, stand_ins)
            with torch.cuda.graph(self.forward, pool=shared.pool, stream=stream, capture_error_mode="thread_local"):
                loss = compute(**self.given)
            self.up = torch.ones_like(loss)
            with torch.cuda.graph(self.backward, pool=shared.pool, stream=stream, capture_error_mode="thread_local"):
                grads = torch.autograd.grad(loss, stand_ins, self.up, allow_unused=True)
                self.dtypes = sorted({g.dtype for g in grads if g is not None}, key=str)
                self.flats = [shared.flat([g for g in grads if g is not None and g.dtype == d]) for d in self.dtypes]
        self.places = [(p, p.data_ptr(), p.requires_grad) for p in model.parameters()]
        self.known = [None if g is None else self.dtypes.index(g.dtype) for g in grads]
        self.result = loss.detach()

    def stands(self) -> bool:
        """Whether the parameters it was recorded with lie where they did."""
        return all(p.data_ptr() == place and p.requires_grad == trained for p, place, trained in self.places)

    def __call__(self, given: Mapping[str, Tensor], turn: _Turn) -> Tensor:
        for name, tensor in given.items():
            self.given[name].copy_(tensor)
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


def _try(compute: Callable[..., Tensor], given: Mapping[str, Tensor], trained: list[Tensor]) -> None:
    """Compute a step that is thrown away, random numbers and all: nothing can be compiled while a graph is recorded."""
    generator = torch.cuda.default_generators[next(iter(given.values())).device.index]
    before = generator.get_offset()
    torch.autograd.grad(compute(**given), trained, allow_unused=True)
    generator.set_offset(before)


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
