"""A GGUF file that grows tensor by tensor, and a journal beside it by which an interrupted conversion goes on.

The journal's first line has the checksum of all that comes before the tensors; each further line names a tensor that
is whole, with the checksum of its bytes. It is believed only where the file has those bytes: what is gone on with has
been read and compared, so that it does not matter in which order a system that lost its power had brought either to the
disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ft_export.gguf.streaming import Stream

__all__ = ["Growing"]

PIECE = 1 << 22
"""Bytes that are read at a time."""


class Growing:
    """A GGUF file on its way; a context manager, which closes it.

    Args:
        path: the file. head: its bytes before those of the tensors.
        sizes: the bytes of each tensor by name, in the file's order.
        alignment: each tensor begins at a multiple of so many bytes.
        journal: where the journal is; without one nothing is gone on with, and a file that is there is overwritten.

    Attributes:
        whole: the checksums (SHA-256) of the tensors that were there already, by name: the first ones.
    """

    def __init__(
        self, path: Path, head: bytes, sizes: Mapping[str, int], alignment: int, journal: Path | None = None
    ) -> None:
        self._alignment, self._journal = alignment, journal
        self._places: dict[str, tuple[int, int]] = {}
        at = len(head)
        for name, size in sizes.items():
            at = self._aligned(at)
            self._places[name] = (at, size)
            at += size
        self._first = {"head": hashlib.sha256(head).hexdigest()}
        self.whole = self._left(path, head)
        if not self.whole:
            path.write_bytes(head)
        self._file: IO[bytes] = path.open("r+b")
        start, size = self._places[list(self.whole)[-1]] if self.whole else (0, len(head))
        self._file.truncate(start + size)
        self._file.seek(0, 2)
        if journal is not None:
            lines = [self._first, *({"tensor": name, "sha256": digest} for name, digest in self.whole.items())]
            journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._pad(self._aligned(self._file.tell()))
        self._file.close()

    def add(self, name: str, stream: Stream) -> str:
        """Write the next tensor.

        Returns:
            The checksum of its bytes.

        Raises:
            ExportError: its blocks have not the bytes it was to have.
        """
        start, _ = self._places[name]
        self._pad(start)
        stream.tofile(self._file)
        self._file.flush()
        if self._journal is not None:
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps({"tensor": name, "sha256": stream.sha256}) + "\n")
        return stream.sha256

    def _aligned(self, at: int) -> int:
        return -(-at // self._alignment) * self._alignment

    def _pad(self, to: int) -> None:
        self._file.write(bytes(to - self._file.tell()))

    def _left(self, path: Path, head: bytes) -> dict[str, str]:
        """The tensors of the journal that the file has, as far as it has all of them."""
        said = self._said()
        if not path.is_file() or said[:1] != [self._first]:
            return {}
        found: dict[str, str] = {}
        with path.open("rb") as file:
            if file.read(len(head)) != head:
                return {}
            for (name, (start, size)), line in zip(self._places.items(), said[1:], strict=False):
                if line.get("tensor") != name or any(file.read(start - file.tell())):
                    break
                digest = _digest(file, size)
                if digest is None or digest != line.get("sha256"):
                    break
                found[name] = digest
        return found

    def _said(self) -> list[dict[str, Any]]:
        """The journal's lines, up to one that was cut short."""
        said: list[dict[str, Any]] = []
        if self._journal is None or not self._journal.is_file():
            return said
        for line in self._journal.read_bytes().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not isinstance(value, dict):
                break
            said.append(value)
        return said


def _digest(file: IO[bytes], size: int) -> str | None:
    """Of the next bytes of a file; None where there are fewer."""
    digest = hashlib.sha256()
    while size:
        piece = file.read(min(PIECE, size))
        if not piece:
            return None
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()
