"""Tensors that wait for backward in the host's memory, on their way there and back while the GPU computes.

A layer's saved tensors are copied to pinned memory on a stream of their own as soon as they are made, and back a little
before backward wants them. Two rules keep the peak the same in every run, however far the host is ahead of the GPU:
memory on the GPU is let go only after the computing stream has been told to wait for the copy out of it, and memory for
what comes back is taken in the order of the program. Both ways two large tensors are under way, about half a layer's,
and small ones beside them: nobody waits as long as copying takes less time than computing.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ft_core.errors import RunError
from ft_core.models.device import host_memory

if TYPE_CHECKING:
    from ft_core.fast.spill import Disk

__all__ = ["HostMemory", "Pool"]

LEAST = 2**20
"""Bytes from which a tensor is worth a copy."""
SHARE = 0.8
"""Of the host's free memory, what the pinned buffers may take."""
AWAY = 2
"""How many large tensors are on their way out before the first of them is waited for."""
AHEAD = 2
"""How many are on their way back before they are wanted."""
LARGE = 1 / 16
"""A tensor of this share of the largest is a large one. Half a layer hands over two and, for long rows, the sums of its
attention, all at once: if those counted, the first would be waited for while its copy has only begun. Such sums are 2
in a head's width of the rest; those of all layers together are about one large tensor."""
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
        self._share: int | None = None
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

    @property
    def room(self) -> int:
        """Bytes that it has or could have."""
        return max(self.bytes, self._limit())

    def _limit(self) -> int:
        if self.most is not None:
            return self.most
        free = int(SHARE * host_memory()[1])
        if not self.bytes:
            self._share = free  # what it takes itself makes the rest smaller, and must not be counted again and again
        return self.bytes + free if self._share is None else min(self.bytes + free, self._share)

    def _slab(self, size: int) -> int:
        return 1 << (IN_A_SLAB * size - 1).bit_length()

    def _memory(self, count: int) -> Tensor:
        try:
            return torch.empty(count, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise RunError(self._refusal(self.bytes + count, self.bytes)) from error

    def _refusal(self, wanted: int, most: int) -> str:
        return (
            f"activations in host memory take {wanted / 2**30:.1f} GiB of it, {most / 2**30:.1f} can be had: "
            "set activations: recompute, or lower max_length or training.batch_size"
        )

    def _more(self, size: int) -> list[Tensor]:
        slab = self._slab(size)
        if self.bytes + slab > self._limit():
            self._let_go()
        if self.bytes + slab > self._limit():
            slab = size
        if self.bytes + slab > self._limit():
            raise RunError(self._refusal(self.bytes + slab, self._limit()))
        memory = self._memory(slab)
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


class HostMemory:
    """Where one model's activations wait.

    Attributes:
        least: bytes from which a tensor is taken there.
        most: bytes of host memory that may be used, or None (see :class:`Pool`).
        pools: by device.
        disk: a folder for what the host's memory cannot hold, or None: then that is refused.
        beyond: bytes of a batch that are expected to go there.
        say: prints one line: that it happens, and what it costs.
    """

    def __init__(self) -> None:
        self.least = LEAST
        self.most: int | None = None
        self.pools: dict[torch.device, Pool] = {}
        self.disk: Path | None = None
        self.beyond = 0
        self.say: Callable[[str], None] = warnings.warn
        self._spilled: Disk | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._order = _Order()
        self._leaving: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __deepcopy__(self, memo: Any) -> HostMemory:
        return HostMemory()

    def begin(self) -> None:
        """A forward pass begins: what it keeps has nothing to do with that of an earlier one."""
        self._order = _Order()
        self.settle()

    def settle(self) -> None:
        """Let go of the GPU's memory of all that is being copied out."""
        self._let_go(0)

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """What is saved for backward in the body waits in host memory."""
        with saved_tensors_hooks(self._take, _bring_back):
            yield

    def pool(self, device: torch.device) -> Pool:
        """The buffers for a device's tensors."""
        if device not in self.pools:
            self.pools[device] = Pool(device.type == "cuda")
        self.pools[device].most = self.most
        return self.pools[device]

    def on_disk(self) -> Pool | None:
        """Buffers in files, where there is a folder for them."""
        if self.disk is None:
            return None
        if self._spilled is None or self._spilled.folder != self.disk:
            from ft_core.fast.spill import Disk

            self._spilled = Disk(self.disk)
        return self._spilled

    def disk_room(self) -> int:
        """Bytes that activations have or could have on the disk."""
        disk = self.on_disk()
        return 0 if disk is None else disk.room

    def leave_disk(self) -> None:
        """Nothing more goes to the disk, and what was there is given back."""
        self.disk = self._spilled = None

    def _buffer(self, count: int, device: torch.device) -> tuple[Tensor, Pool]:
        """So many bytes, and whose they are: the host's memory while there is room, else the disk's."""
        pool, disk = self.pool(device), self.on_disk()
        try:
            return pool.take(count), pool
        except RunError:
            if disk is None:
                raise
        is_first = not disk.bytes
        buffer = disk.take(count)
        if is_first:
            from ft_core.fast.spill import RATE

            size = max(self.beyond, count)
            self.say(
                f"the host's memory cannot hold all activations: about {size / 2**30:.1f} GiB of a batch go to a file "
                f"in {self.disk}, which costs some {2 * size / RATE:.0f} s a batch at a disk's {RATE / 1e9:.0f} GB/s"
            )
        return buffer, disk

    def _take(self, tensor: Tensor) -> Any:
        """Take a saved tensor to the host, unless it is small, a parameter, or full of gaps."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        tensor = tensor.detach()  # an output with its graph would keep that alive, and itself
        if tensor.nbytes < max(self.least, 1) or not _is_dense(tensor):
            return tensor
        buffer, pool = self._buffer(tensor.nbytes, tensor.device)
        held = _Held(tensor, buffer, pool, self._stream(tensor.device), self._order)
        self._leaving.append((tensor, held.copied))
        self._order.largest = max(self._order.largest, tensor.nbytes)
        self._let_go(AWAY)
        return held

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """Where copies run; None where the host computes itself."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _let_go(self, but: int) -> None:
        """The computing stream waits for all copies but the last ones, whose sources are then free."""
        under_way = sum(self._order.is_large(tensor.nbytes) for tensor, _ in self._leaving)
        while self._leaving and (under_way > but or not but):
            tensor, copied = self._leaving.pop(0)
            under_way -= self._order.is_large(tensor.nbytes)
            if copied is not None:
                torch.cuda.current_stream(tensor.device).wait_event(copied)


class _Order:
    """What one forward pass has taken to the host, in order; backward wants it the other way round.

    Attributes:
        largest: bytes of the largest tensor.
    """

    def __init__(self) -> None:
        self.held: list[weakref.ref[_Held]] = []
        self.largest = 0

    def is_large(self, count: int) -> bool:
        """Whether a tensor of so many bytes is one of those that are counted."""
        return count >= LARGE * self.largest


class _Held:
    """A tensor in host memory; its buffer is given back when nobody holds this any more.

    Attributes:
        copied: when the copy out is done.
    """

    def __init__(
        self, tensor: Tensor, buffer: Tensor, pool: Pool, stream: torch.cuda.Stream | None, order: _Order
    ) -> None:
        self.device, self.dtype, self.count = tensor.device, tensor.dtype, tensor.numel()
        self.shape, self.stride = tensor.shape, tensor.stride()
        self._stream, self._order, self._place = stream, order, len(order.held)
        order.held.append(weakref.ref(self))
        if stream is None or not torch.cuda.is_current_stream_capturing():
            weakref.finalize(self, pool.give, buffer).atexit = False
        # A recorded step writes there at each replay: nobody else may have the buffer again.
        self._host = buffer[: tensor.nbytes].view(tensor.dtype)
        self._back: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._was_back = False
        with _after(stream):
            self._host.copy_(tensor.as_strided((self.count,), (1,)), non_blocking=True)
            self.copied = None if stream is None else stream.record_event()

    def __del__(self) -> None:
        # Nobody waits for it any more, so its memory must not be another's before the copy into it is done.
        back, stream = self.__dict__.get("_back"), self.__dict__.get("_stream")
        if back is not None and stream is not None:
            back.record_stream(stream)

    def set_out(self) -> None:
        """Start bringing it back; once is enough, whoever wants it again waits for it."""
        if not self._was_back:
            self._set_out()

    def come_back(self) -> Tensor:
        """The tensor as it was; the next that backward will want set out."""
        self._set_out()
        ahead = 0
        for place in range(self._place - 1, -1, -1):
            held = self._order.held[place]()
            if held is None:
                continue
            ahead += self._order.is_large(held.count * held.dtype.itemsize)
            if ahead > AHEAD:
                break
            held.set_out()
        back, ready = self._back, self._ready
        assert back is not None
        self._back, self._ready, self._was_back = None, None, True
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
        return back.as_strided(self.shape, self.stride)

    def _set_out(self) -> None:
        if self._back is not None:
            return
        self._back = torch.empty(self.count, dtype=self.dtype, device=self.device)
        with _after(self._stream):
            self._back.copy_(self._host, non_blocking=True)
            self._ready = None if self._stream is None else self._stream.record_event()


def _bring_back(packed: Any) -> Tensor:
    return packed.come_back() if isinstance(packed, _Held) else packed


@contextlib.contextmanager
def _after(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Copies in the body run on the stream, after all that was computed before."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie one right after the other in memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.layout == torch.strided
