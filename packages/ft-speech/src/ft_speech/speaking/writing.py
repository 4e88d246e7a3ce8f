"""Where speech goes as it is made: a file that appears when it is whole, a file that grows, or stdout."""

from __future__ import annotations

import os
import secrets
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import soundfile

from ft_speech.audio import AudioError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["as_sixteen_bits", "sink", "wav_header"]

ENDLESS = 0xFFFFFFFF
"""What a wav's header says of a length that is not known yet."""


@contextmanager
def sink(
    out: str | os.PathLike[str],
    sample_rate: int,
    *,
    grows: bool = False,
    raw: bool = False,
    stdout: BinaryIO | None = None,
) -> Iterator[Callable[[npt.NDArray[np.float32]], None]]:
    """A function that takes pieces of mono audio, float32 ``[samples]``, full scale -1 to 1, cut off beyond it.

    A file is written beside its place and renamed at the end; where the work fails, what was written is removed.

    Args:
        out: a path whose ending says the format, or ``-`` for stdout.
        sample_rate: in Hz.
        grows: whether the file, a wav, is written at its place, its header being right after each piece; where the work
            fails, what was spoken by then stays.
        raw: whether stdout gets little-endian 16-bit samples alone, without a wav's header.
        stdout: another stream in its place.

    Raises:
        AudioError: the file cannot be written, or its format does not have the rate.
    """
    if os.fspath(out) == "-":
        stream = sys.stdout.buffer if stdout is None else stdout
        if not raw:
            stream.write(wav_header(sample_rate))
        yield lambda piece: _to_stream(stream, piece)
        return
    target = Path(out)
    beside = target if grows else target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    format = target.suffix.lower().lstrip(".").upper()
    try:
        file = soundfile.SoundFile(beside, "w", sample_rate, 1, format=format)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        with suppress(OSError):
            if not grows:
                beside.unlink(missing_ok=True)
        raise AudioError(
            f"{target}: {format.lower()} at {sample_rate} Hz cannot be written: {_reason(error)}"
        ) from error
    try:
        try:
            yield lambda piece: _to_file(file, piece, target, grows)
        except BaseException:  # of the work itself, which is not called an error of writing
            with suppress(soundfile.SoundFileError, OSError):
                file.close()
            raise
        with _said(target):
            file.close()
            if not grows:
                os.replace(beside, target)
    finally:
        if not grows:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


@contextmanager
def _said(target: Path) -> Iterator[None]:
    """Around what is done to the file alone."""
    try:
        yield
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{target}: cannot be written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()))


def _to_file(file: Any, piece: npt.NDArray[np.float32], target: Path, grows: bool) -> None:
    before = file.frames
    with _said(target):
        file.write(np.clip(piece, -1, 1))
        if grows:
            file.flush()
    if file.frames - before != len(piece):
        raise AudioError(f"{target}: cannot be written: the disk took {file.frames - before} of {len(piece)} samples")


def _to_stream(stream: BinaryIO, piece: npt.NDArray[np.float32]) -> None:
    stream.write(as_sixteen_bits(piece))
    stream.flush()


def as_sixteen_bits(piece: npt.NDArray[np.float32]) -> bytes:
    """Samples as little-endian 16-bit integers."""
    return bytes(np.round(np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())


def wav_header(sample_rate: int) -> bytes:
    """The header of a mono wav of 16 bits whose length is not known yet (RIFF: IBM and Microsoft 1991)."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", ENDLESS, b"WAVE") + form + struct.pack("<4sI", b"data", ENDLESS)
