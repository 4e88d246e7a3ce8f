"""Frozen weights that live in the host's memory, and are lent to the GPU while their layer computes.

A layer's weights set out on a stream of their own when the layer before begins, forwards and backwards, and their
memory on the GPU is free again when the layer is done: two layers' weights are there at a time. Nobody waits as long as
copying them takes less time than computing a layer, so that all that it costs is memory of the host.

The parameters stay what and where they are, as does everything that refers to them: only the storage beneath is
emptied and filled again, as FSDP does it. Whoever reads an emptied one finds no memory there. Filling goes past
autograd's count of changes, since the numbers are those that were there before.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ft_core.errors import RunError
from ft_core.fast.forwards import Forward
from ft_core.fast.linears import LENT
from ft_kernels import gather_rows

if TYPE_CHECKING:
    from ft_core.fast.swap import FastPath

__all__ = ["LentWeights", "head_lent"]

LEAST = 2**20
"""Bytes from which a tensor is worth a copy."""
ALIGN = 256
"""Bytes at whose multiples weights begin, as in memory of their own."""


class _Group:
    """Weights that come and go together.

    Attributes:
        is_here: whether they are on the GPU, or on their way to it. bytes: of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], stream: torch.cuda.Stream | None, pin: bool) -> None:
        self.is_here, self._stream, self._pin = True, stream, pin
        self._ready: torch.cuda.Event | None = None
        self._storages: dict[int, torch.UntypedStorage] = {}
        _join([p for p in parameters if p.untyped_storage().nbytes() == p.nbytes and p.is_contiguous()])
        for parameter in parameters:
            storage = parameter.untyped_storage()
            setattr(parameter, LENT, True)
            self._storages[storage._cdata] = storage
        self._parameters = list(parameters)
        self._host: list[Tensor] = []
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())

    def host_of(self, parameter: Tensor) -> Tensor:
        """A parameter's numbers as they lie in the host's memory."""
        place = list(self._storages).index(parameter.untyped_storage()._cdata)
        whole = self._host[place].view(parameter.dtype)
        return whole.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())

    def leave(self) -> None:
        """Let their memory on the GPU go."""
        if not self.is_here:
            return
        if not self._host:
            self._host = [self._home(storage) for storage in self._storages.values()]
        self._arrive()
        for storage in self._storages.values():
            storage.resize_(0)
        self.is_here = False

    def set_out(self) -> None:
        """Start on the way to the GPU."""
        if self.is_here:
            return
        try:
            for storage, host in zip(self._storages.values(), self._host, strict=True):
                storage.resize_(host.numel())
        except BaseException:  # out of memory: what has some would never be filled
            for storage in self._storages.values():
                storage.resize_(0)
            raise
        self.is_here = True
        if self._stream is None:
            self._fill()
            return
        # The memory may have been another's until just now, for what is still being computed.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._fill()
            self._ready = self._stream.record_event()

    def come(self) -> None:
        """Be there for what is computed from here on."""
        self.set_out()
        self._arrive()

    def end(self) -> None:
        """Be parameters as any others, on the GPU."""
        self.come()
        for parameter in self._parameters:
            if hasattr(parameter, LENT):
                delattr(parameter, LENT)

    def _arrive(self) -> None:
        if self._ready is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._ready)
        self._ready = None

    def _home(self, storage: torch.UntypedStorage) -> Tensor:
        """A copy in the host's memory, pinned in its place: torch rounds what it pins itself up to a power of two."""
        try:
            home = torch.empty(storage.nbytes(), dtype=torch.uint8)
            if self._pin:
                runtime: Any = torch.cuda.cudart()
                if int(runtime.cudaHostRegister(home.data_ptr(), home.numel(), 0)):
                    raise RuntimeError("it cannot be pinned")
                weakref.finalize(self, runtime.cudaHostUnregister, home.data_ptr()).atexit = False
        except RuntimeError as error:
            raise RunError(
                f"weights cannot wait in the host's memory: {storage.nbytes() / 2**20:.0f} MiB of it cannot be had"
            ) from error
        return home.copy_(_bytes(storage))

    def _fill(self) -> None:
        for storage, host in zip(self._storages.values(), self._host, strict=True):
            _bytes(storage).copy_(host, non_blocking=True)


class LentWeights:
    """The lent weights of one model.

    Args:
        path: the model's fast layers.
        layers: how many of them lend theirs, the first ones first; None for all.
        ends: whether the embedding's and the head's are lent too, where they are frozen.
        pin: whether the host's memory is pinned, so that copies run beside the computing.

    Raises:
        RunError: the host's memory cannot hold them.
    """

    def __init__(self, path: FastPath, layers: int | None = None, *, ends: bool = True, pin: bool = True) -> None:
        modules = path.layers
        self._last = len(modules) - 1
        device = next(modules[0].parameters()).device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pin = pin and stream is not None
        count = len(modules) if layers is None else layers
        self._place = {id(module): place for place, module in enumerate(modules)}
        self._groups: list[_Group | None] = [None] * len(modules)
        self._head: _Group | None = None
        self._table: _Group | None = None  # of the embedding, which never comes but to stay
        self._forwards: list[Forward] = []
        self._ending = False
        for place, module in enumerate(modules[:count]):
            taken = _worth(module.parameters())
            if taken:
                self._groups[place] = _Group(taken, stream, pin)
        if ends:
            self._take_ends(path, stream, pin)
        try:
            for group in self._all():
                group.leave()
        except BaseException:
            self.end()
            raise
        if stream is not None:
            torch.cuda.empty_cache()  # what the weights took lies in their sizes, which nobody else asks for

    @property
    def bytes(self) -> int:
        """Of all that is lent."""
        return sum(group.bytes for group in self._all())

    def come(self, module: nn.Module) -> None:
        """A layer is about to compute: its weights are there, and the next one's set out."""
        place = self._place[id(module)]
        if not place:
            self._ending = False  # a backward pass before this one may have failed
        group = self._groups[place]
        if group is not None:
            group.come()
        self._set_out(place + 1)

    def done(self, module: nn.Module, out: Any) -> None:
        """A layer has computed: its weights go, but come back before backward wants them."""
        place, first = self._place[id(module)], out[0] if isinstance(out, tuple) else out
        goes_back = torch.is_grad_enabled() and first.requires_grad
        if goes_back:
            first.register_hook(lambda gradient: self._before(place))
        if not goes_back or place != self._last:
            self._leave(place)

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """In the body the head's weight is there; where a graph is made, until the layers are differentiated."""
        if self._head is None:
            yield
            return
        self._head.come()
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self._head.leave()

    def reset(self) -> None:
        """A step that failed is over: no weights are on the GPU."""
        self._ending = False
        for group in self._all():
            group.leave()

    def end(self) -> None:
        """All weights are the GPU's own again."""
        for group in self._all():
            group.end()
        for forward in self._forwards:
            if vars(forward.module).get("forward") is forward:
                del forward.module.forward
        self._forwards.clear()

    def _all(self) -> list[_Group]:
        return [group for group in (*self._groups, self._head, self._table) if group is not None]

    def _set_out(self, place: int) -> None:
        group = self._groups[place] if 0 <= place <= self._last else self._head if place > self._last else None
        if group is not None:
            group.set_out()

    def _leave(self, place: int) -> None:
        group = self._groups[place]
        if group is not None:
            group.leave()

    def _before(self, place: int) -> None:
        """Backward has come to a layer's output."""
        if not self._ending:
            self._ending = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.reset)
        if self._head is not None:
            self._head.leave()
        for other, group in enumerate(self._groups):
            if group is not None and other not in (place, place - 1):
                group.leave()
        group = self._groups[place]
        if group is not None:
            group.come()
        self._set_out(place - 1)

    def _take_ends(self, path: FastPath, stream: torch.cuda.Stream | None, pin: bool) -> None:
        """The head and the embedding, where both are what transformers made them: an adapter's wrapping reads the
        weight by itself, and writes it down with the adapter."""
        model = path.model
        embedding, head = model.get_input_embeddings(), getattr(model, path.layout.head, None)
        if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
            return
        if taken := _worth(head.parameters()):
            self._head = _Group(taken, stream, pin)
            self._put(_HeadForward(path, head, self.head))
        tied = self._head is not None and hasattr(embedding.weight, LENT)
        if not tied and (taken := _worth(embedding.parameters())):
            self._table = _Group(taken, stream, pin)
        group = self._head if tied else self._table
        if group is not None:
            self._put(_RowsForward(path, embedding, group, lambda: self._set_out(0)))

    def _put(self, forward: Forward) -> None:
        forward.module.forward = forward  # type: ignore[assignment]
        self._forwards.append(forward)


def head_lent(path: FastPath | None) -> contextlib.AbstractContextManager[None]:
    """In the body the head's weight is there, wherever it lives (:meth:`LentWeights.head`)."""
    return contextlib.nullcontext() if path is None or path.lent is None else path.lent.head()


class _RowsForward(Forward):
    """An embedding of which no more than the rows of a batch ever come to the GPU."""

    def __init__(self, path: FastPath, module: nn.Embedding, group: _Group, begin: Callable[[], None]) -> None:
        super().__init__(path, module)
        self._group, self._begin = group, begin

    def __call__(self, input: Tensor) -> Any:
        self._begin()  # the first layer is next, or a vision tower before it
        weight: Any = self.module.weight
        rows = gather_rows(self._group.host_of(weight), input.flatten())
        whole, weight.data = weight.data, rows
        try:  # a family may do more than look up: scale what was found, say
            return self.own(torch.arange(len(rows), device=rows.device).view(input.shape))
        finally:
            weight.data = whole


class _HeadForward(Forward):
    """A head that somebody calls: its weight is lent for as long."""

    def __init__(
        self, path: FastPath, module: nn.Module, lent: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        super().__init__(path, module)
        self._lent = lent

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        with self._lent():
            return self.own(*args, **keywords)


def _worth(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Frozen ones that are large, each once."""
    found = {id(p): p for p in parameters if not p.requires_grad and p.nbytes >= LEAST}
    return [p for p in found.values() if p.untyped_storage().nbytes()]


def _join(parameters: Sequence[nn.Parameter]) -> None:
    """Let parameters lie one behind the other: one copy brings them all."""
    if len(parameters) < 2:
        return
    ends = list(itertools.accumulate(-(-p.nbytes // ALIGN) * ALIGN for p in parameters))
    flat = torch.empty(ends[-1], dtype=torch.uint8, device=parameters[0].device)
    for parameter, start in zip(parameters, [0, *ends], strict=False):
        place = flat[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a tensor that autograd knows nothing of."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
