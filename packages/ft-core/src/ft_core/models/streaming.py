"""Weights from safetensors files to the GPU: read ahead by a few threads into pinned memory, copied from there.

transformers maps the files into memory and copies each tensor out of the map, one after another where it quantizes on
the way: every page is a fault, and the copy goes through the driver's own small buffer while nothing else happens.
Here transformers still builds, converts, quantizes and places everything; it is only handed other tensors than those
of the map: :class:`Slice`, whose content is on the device when it is asked for, and was read while the one before it
was quantized. No more than the tensor that is being asked for is on the GPU in the file's format.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Entry", "Reader", "Slice", "read_headers"]

PIECE = 16 << 20
"""Bytes that are read at once: many enough that Python's own lock doesn't count, short enough for several threads."""
AHEAD, ASKED = 12, 4
"""Pieces of memory for what is read ahead and for what is asked for out of turn: 256 MiB of pinned memory in all."""
THREADS = 8
"""One thread copies a few gigabytes a second out of the page cache; the GPU takes what eight of them give."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The formats of a safetensors file that are read here; the others are transformers' to read."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``size`` bytes from ``start`` on in ``file``, as numbers of ``dtype`` in ``shape``."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_headers(files: Sequence[Path]) -> dict[str, Entry] | None:
    """The tensors of safetensors files by name; None if there is anything in them that is not known here.

    The files' sizes are not looked at: :func:`ft_core.models.source.check_folder` does.
    """
    found: dict[str, Entry] = {}
    for file in files:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape = DTYPES.get(entry.get("dtype")), tuple(entry.get("shape", (-1,)))
            start, end = entry["data_offsets"]
            if dtype is None or end - start != math.prod(shape) * dtype.itemsize or min((start, *shape)) < 0:
                return None
            found[name] = Entry(file, 8 + length + start, end - start, dtype, shape)
    return found


@dataclass(eq=False)
class _Slot:
    """A piece of pinned memory, and the copy out of it that has to be over before it is written again."""

    memory: Tensor
    is_ahead: bool
    copied: torch.cuda.Event | None


@dataclass(eq=False)
class _Piece:
    """Bytes ``first`` to ``last`` of a tensor, and the slot that they are read into."""

    entry: Entry
    first: int
    last: int
    filled: Future[_Slot] = field(default_factory=Future)


def _pieces(entry: Entry, size: int) -> list[_Piece]:
    return [_Piece(entry, first, min(first + size, entry.size)) for first in range(0, entry.size, size)]


class Reader:
    """Reads tensors onto a device, in the order in which transformers asks for them; a context manager.

    Args:
        entries: the tensors by name.
        device: where they go.
        piece, ahead, asked, threads: as :data:`PIECE`, :data:`AHEAD`, :data:`ASKED` and :data:`THREADS`.

    A tensor that is asked for before it was begun is read at once, by all threads and in memory of its own. So no order
    can block: a tensor that was begun gets every slot that it gives back, since it is read to its end before the next.
    """

    def __init__(
        self,
        entries: dict[str, Entry],
        device: torch.device,
        *,
        piece: int = PIECE,
        ahead: int = AHEAD,
        asked: int = ASKED,
        threads: int = THREADS,
    ) -> None:
        self.entries, self.device, self.piece = entries, device, piece
        self._changed = threading.Condition()
        self._free: dict[bool, list[_Slot]] = {True: [], False: []}
        for memory, is_ahead in zip(
            _memory(ahead + asked, piece, device), [True] * ahead + [False] * asked, strict=True
        ):
            event = torch.cuda.Event() if device.type == "cuda" else None
            self._free[is_ahead].append(_Slot(memory, is_ahead, event))
        self._begun: dict[str, list[_Piece]] = {}
        self._asked: deque[_Piece] = deque()
        self._skipped: set[str] = set()
        self._plan = self._planned()
        self._waited_for: set[_Piece] = set()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True, name="ft-read") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def slices(self) -> dict[str, Slice]:
        """The tensors as transformers takes them for a state dict."""
        return {name: Slice(self, name) for name in self.entries}

    def take(self, name: str) -> Tensor:
        """A tensor on the device, in the file's format; the copy may still be on its way on the current stream.

        Raises:
            OSError: its file cannot be read, or has become shorter.
        """
        entry = self.entries[name]
        # Before anything is read for it: where this fails, no piece of memory is left with what nobody fetches.
        content = torch.empty(entry.size, dtype=torch.uint8, device=self.device)
        with self._changed:
            pieces = self._begun.pop(name, None)
            if pieces is None:
                if self._closed:
                    raise OSError(f"{entry.file.name} is not read any more")
                pieces = _pieces(entry, self.piece)
                self._waited_for.update(pieces)
                self._skipped.add(name)
                self._asked.extend(pieces)
                self._changed.notify_all()
        for piece in pieces:
            slot = piece.filled.result()
            content[piece.first : piece.last].copy_(slot.memory[: piece.last - piece.first], non_blocking=True)
            if slot.copied is not None:
                slot.copied.record(torch.cuda.current_stream(self.device))
            self._give_back(slot, piece)
        return content.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        """Stop reading; what was taken is whole once this returns."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            waited_for = list(self._waited_for)
        for piece in waited_for:  # transformers' own threads may still wait, where it has failed
            if not piece.filled.done():
                piece.filled.set_exception(OSError(f"{piece.entry.file.name} is not read any more"))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _planned(self) -> Iterator[_Piece]:
        """The pieces to read ahead: of each tensor in transformers' order, unless it was asked for already."""
        for name in sorted(self.entries, key=_natural):
            if name not in self._skipped:
                pieces = self._begun[name] = _pieces(self.entries[name], self.piece)
                self._waited_for.update(pieces)
                yield from pieces

    def _next(self) -> tuple[_Piece, _Slot] | None:
        """What to read next and where to; waits for a free slot. None at the end."""
        with self._changed:
            while not self._closed:
                if self._asked and self._free[False]:
                    return self._asked.popleft(), self._free[False].pop()
                if self._free[True] and (piece := next(self._plan, None)) is not None:
                    return piece, self._free[True].pop()
                self._changed.wait()
        return None

    def _give_back(self, slot: _Slot, piece: _Piece) -> None:
        with self._changed:
            self._waited_for.discard(piece)
            self._free[slot.is_ahead].append(slot)
            self._changed.notify()

    def _work(self) -> None:
        path: Path | None = None
        file: Any = None
        try:
            while (job := self._next()) is not None:
                piece, slot = job
                try:
                    if slot.copied is not None:
                        slot.copied.synchronize()
                    if path != piece.entry.file:
                        # No more than one a thread: large models have more files than a process may open.
                        if file is not None:
                            file.close()
                        file = path = None
                        file, path = open(piece.entry.file, "rb", buffering=0), piece.entry.file  # noqa: SIM115
                    _fill(file, piece.entry.start + piece.first, slot.memory[: piece.last - piece.first])
                except BaseException as error:  # whoever waits for the piece has to hear of it
                    piece.filled.set_exception(error)
                    self._give_back(slot, piece)
                else:
                    piece.filled.set_result(slot)
        finally:
            if file is not None:
                file.close()


class Slice:
    """A tensor of a :class:`Reader` that is read when it is indexed, like one of ``safetensors.safe_open``."""

    def __init__(self, reader: Reader, name: str) -> None:
        self.reader, self.name = reader, name

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self.reader.entries[self.name].shape)

    def get_dtype(self) -> str:
        """Its format, as the file calls it."""
        dtype = self.reader.entries[self.name].dtype
        return next(name for name, known in DTYPES.items() if known is dtype)

    def __getitem__(self, index: Any) -> Tensor:
        whole = self.reader.take(self.name)
        return whole if index is Ellipsis else whole[index]


def _memory(count: int, size: int, device: torch.device) -> Sequence[Tensor]:
    """Memory to read into: pinned for a GPU, where the machine lets us pin that much."""
    if device.type == "cuda":
        try:
            return torch.empty((count, size), dtype=torch.uint8, pin_memory=True).unbind()
        except RuntimeError:  # a limit on locked memory: the driver copies it once more
            pass
    return torch.empty((count, size), dtype=torch.uint8).unbind()


def _fill(file: Any, start: int, memory: Tensor) -> None:
    buffer: Any = memory.numpy()
    view = memoryview(buffer)
    while view:
        if hasattr(os, "preadv"):
            read = os.preadv(file.fileno(), [view], start)
        else:
            file.seek(start)
            read = file.readinto(view)
        if not read:
            raise OSError(f"{os.path.basename(file.name)} ends early")
        view, start = view[read:], start + read


def _natural(name: str) -> list[tuple[int, int, str]]:
    """transformers' order: part by part, numbers by their value. Another order would only be slower."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
