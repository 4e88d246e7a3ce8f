"""Finds files that were cut short where libsndfile would read what is left and say nothing."""

from __future__ import annotations

from typing import BinaryIO

__all__ = ["missing_bytes"]

_UNKNOWN = (0, 0xFFFFFFFF)  # what a program writes that streams a wav and cannot go back to its header
_OGG_PAGE = 27 + 255 + 255 * 255  # header, lacing values, body: RFC 3533, section 6


def missing_bytes(file: BinaryIO) -> int:
    """How many bytes a wav or Ogg file lacks by its own account; 0 if none, or if it is of another format.

    The file must be seekable; where it stands afterwards is undefined.
    """
    file.seek(0)
    start = file.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WAVE":
        return _missing_in_wav(file)
    if start[:4] == b"OggS":
        return _missing_in_ogg(file)
    return 0


def _missing_in_wav(file: BinaryIO) -> int:
    length = file.seek(0, 2)
    position = 12
    while position + 8 <= length:
        file.seek(position)
        header = file.read(8)
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"data":
            return 0 if size in _UNKNOWN else max(0, position + 8 + size - length)
        position += 8 + size + size % 2  # chunks are padded to even lengths
    return 0


def _missing_in_ogg(file: BinaryIO) -> int:
    """Only the last page is looked at: a cut almost always falls inside one."""
    length = file.seek(0, 2)
    file.seek(max(0, length - _OGG_PAGE))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return 1
    return max(0, 27 + page[26] + sum(page[27 : 27 + page[26]]) - len(page))
