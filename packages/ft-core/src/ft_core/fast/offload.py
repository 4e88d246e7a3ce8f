"""Tensors that wait for backward in the host's memory, on their way there and back while the GPU computes.

A layer's saved tensors are copied to pinned memory on a stream of their own as soon as they are made, and back while
backward computes the layer after. Two rules keep the peak the same in every run, however far the host is ahead of the
GPU: memory on the GPU is let go only after the computing stream has been told to wait for the copy out of it, and
memory for what comes back is taken in the order of the program. The layer before last is the one that is waited for, so
nobody waits as long as copying a layer's tensors takes less than computing one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ft_core.errors import RunError
from ft_core.models.device import host_memory

__all__ = ["HostMemory", "Pool"]

LEAST = 2**20
"""Bytes from which a tensor is worth a copy."""
SHARE = 0.8
"""Of the host's free memory, what the pinned buffers may take."""
IN_A_SLAB = 8
"""At least so many buffers are pinned at once: torch rounds what it pins up to a power of two."""


class Pool:
    """Host memory in buffers that are used again and again.

    Attributes:
        pinned: whether the GPU can copy to and from it by itself.
        most: bytes it may take, or None for a share of what is free when more is wanted.
        bytes: what it has taken.
    """

    def __init__(self, pinned: bool, most: int | None = None) -> None:
        self.pinned, self.most, self.bytes = pinned, most, 0
        self._free: dict[int, list[Tensor]] = {}
        self._slabs: dict[int, list[Tensor]] = {}

    def take(self, count: int) -> Tensor:
        """``count`` bytes, from the start of a buffer that may be longer.

        Raises:
            RunError: the host has no memory left for it.
        """
        size = _class(count)
        free = self._free.setdefault(size, [])
        if not free:
            free += self._more(size)
        return free.pop()

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free[buffer.numel()].append(buffer)

    def holds(self, wanted: int) -> bool:
        """Whether so many bytes in all could be had."""
        return wanted <= max(self.bytes, self._limit())

    def _limit(self) -> int:
        return self.bytes + int(SHARE * host_memory()[1]) if self.most is None else self.most

    def _more(self, size: int) -> list[Tensor]:
        slab = 1 << (IN_A_SLAB * size - 1).bit_length()
        if self.bytes + slab > self._limit():
            self._let_go()
        if self.bytes + slab > self._limit():
            slab = size
        if self.bytes + slab > self._limit():
            raise RunError(_refusal(self.bytes + slab, self._limit()))
        try:
            memory = torch.empty(slab, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise RunError(_refusal(self.bytes + slab, self.bytes)) from error
        self.bytes += slab
        self._slabs.setdefault(size, []).append(memory)
        return list(memory[: slab // size * size].split(size))

    def _let_go(self) -> None:
        """Give back buffers of sizes of which none is in use."""
        for size, slabs in list(self._slabs.items()):
            count = sum(slab.numel() // size for slab in slabs)
            if len(self._free[size]) == count:
                self.bytes -= sum(slab.numel() for slab in slabs)
                self._free[size].clear()
                del self._slabs[size]


def _class(count: int) -> int:
    """Sizes in steps of an eighth, so that batches of nearly the same length share buffers."""
    step = 1 << max((count - 1).bit_length() - 4, 12)
    return -(-count // step) * step


def _refusal(wanted: int, most: int) -> str:
    return (
        f"activations in host memory take {wanted / 2**30:.1f} GiB of it, {most / 2**30:.1f} can be had: "
        "set activations: recompute, or lower max_length or training.batch_size"
    )


class HostMemory:
    """Where one model's activations wait.

    Attributes:
        least: bytes from which a tensor is taken there.
        most: bytes of host memory that may be used, or None (see :class:`Pool`).
        pools: by device.
    """

    def __init__(self) -> None:
        self.least, self.most = LEAST, None
        self.pools: dict[torch.device, Pool] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: _Group | None = None
        self._leaving: list[_Leaving] = []

    def __deepcopy__(self, memo: Any) -> HostMemory:
        return HostMemory()

    def begin(self) -> None:
        """A forward pass begins: what it keeps is not that of an earlier one."""
        self._last = None
        self.settle()

    def settle(self) -> None:
        """Let go of the GPU's memory of all that is being copied out."""
        self._let_go(None)

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """What is saved for backward in the body waits in host memory."""
        before = self._last
        self._let_go(before)
        group = self._last = _Group(self, before)
        with saved_tensors_hooks(group.pack, _come_back):
            yield

    def pool(self, device: torch.device) -> Pool:
        """The buffers for a device's tensors."""
        if device not in self.pools:
            self.pools[device] = Pool(device.type == "cuda", self.most)
        return self.pools[device]

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """Where copies run; None where the host computes itself."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def leave(self, leaving: _Leaving) -> None:
        """Hold a tensor until its copy is waited for."""
        self._leaving.append(leaving)

    def _let_go(self, but: _Group | None) -> None:
        """Of all groups but one: the computing stream waits for their copies, whose sources are then free."""
        for leaving in self._leaving:
            if leaving.group is not but and leaving.done is not None:
                torch.cuda.current_stream(leaving.tensor.device).wait_event(leaving.done)
        self._leaving = [leaving for leaving in self._leaving if leaving.group is but and but is not None]


class _Leaving:
    """A tensor that is being copied out."""

    def __init__(self, tensor: Tensor, group: _Group, done: torch.cuda.Event | None) -> None:
        self.tensor, self.group, self.done = tensor, group, done


class _Group:
    """What one layer saved in one forward pass.

    Attributes:
        before: the group of the layer before it, which backward wants next.
    """

    def __init__(self, memory: HostMemory, before: _Group | None) -> None:
        self.memory, self.before = memory, before
        self._held: list[weakref.ref[_Held]] = []

    def pack(self, tensor: Tensor) -> Any:
        """Take a saved tensor to the host, unless it is small, a parameter, or full of gaps."""
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < self.memory.least or not _is_dense(tensor):
            return tensor
        held = _Held(tensor.detach(), self)
        self._held.append(weakref.ref(held))
        return held

    def fetch(self) -> None:
        """Start bringing back all that is still wanted."""
        for reference in self._held:
            held = reference()
            if held is not None:
                held.fetch()


class _Held:
    """A tensor in host memory; its buffer is given back when nobody holds this any more."""

    def __init__(self, tensor: Tensor, group: _Group) -> None:
        self.group, self.device, self.dtype = group, tensor.device, tensor.dtype
        self.shape, self.stride, self.count = tensor.shape, tensor.stride(), tensor.numel()
        self._back: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        memory = group.memory
        pool = memory.pool(tensor.device)
        buffer = pool.take(tensor.nbytes)
        weakref.finalize(self, pool.give, buffer).atexit = False
        self._host = buffer[: tensor.nbytes].view(tensor.dtype)
        flat, done = tensor.as_strided((self.count,), (1,)), None
        with _after(memory.stream(self.device)) as stream:
            self._host.copy_(flat, non_blocking=True)
            if stream is not None:
                done = stream.record_event()
        memory.leave(_Leaving(tensor, group, done))

    def fetch(self) -> None:
        """Start bringing it back."""
        if self._back is not None:
            return
        self._back = torch.empty(self.count, dtype=self.dtype, device=self.device)
        with _after(self.group.memory.stream(self.device)) as stream:
            self._back.copy_(self._host, non_blocking=True)
            if stream is not None:
                self._ready = stream.record_event()

    def come_back(self) -> Tensor:
        """The tensor as it was; what the layer before saved sets out too."""
        self.group.fetch()
        if self.group.before is not None:
            self.group.before.fetch()
        back, ready = self._back, self._ready
        assert back is not None
        self._back = self._ready = None
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
        return back.as_strided(self.shape, self.stride)


def _come_back(packed: Any) -> Tensor:
    return packed.come_back() if isinstance(packed, _Held) else packed


@contextlib.contextmanager
def _after(stream: torch.cuda.Stream | None) -> Iterator[torch.cuda.Stream | None]:
    """Copies in the body run on the stream, after all that was computed before."""
    if stream is None:
        yield None
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield stream


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie one right after the other in memory, in whatever order of dimensions."""
    return tensor.layout == torch.strided and _extent(tensor.shape, tensor.stride()) == tensor.numel()


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements, if there is no gap; -1 if there is one, or two elements in one place."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != expected:
            return -1
        expected *= size
    return expected
