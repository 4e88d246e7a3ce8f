"""Audio files read, resampled and written: soundfile (libsndfile) decodes, soxr resamples."""

from __future__ import annotations

import io
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from ft_core.errors import FtError
from ft_speech.containers import missing_bytes
from ft_speech.resampling import by_torchaudio

__all__ = [
    "FORMATS", "SAMPLING_RATES", "SLACK", "AudioError", "AudioInfo", "audio_info", "read_audio", "resample",
    "write_audio",
]  # fmt: skip

Samples: TypeAlias = npt.NDArray[np.float32]
Backend: TypeAlias = Literal["soxr", "torchaudio"]

FORMATS = ("wav", "flac", "ogg", "mp3")
"""The formats that are read and written; ``ogg`` holds Vorbis or Opus."""

SAMPLING_RATES = range(1_000, 768_001)
"""The sampling rates, in Hz, that are taken: anything else in a header is damage, and resampling it would explode."""

SLACK = 0.5
"""Seconds by which the end of a stretch may lie behind the end of what it is of: such times are often rounded."""

_CONTAINERS = {"WAV": "wav", "WAVEX": "wav", "RF64": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3"}
_SOUND_ERRORS = (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OSError)
_VORBIS_PAGE = 255 * 4096  # the most samples that a page can hold: 255 packets of half a window of 8192
_BLOCK = 1 << 18  # samples of one channel that are decoded at a time


class AudioError(FtError):
    """Audio that cannot be used; the message names the file and the reason."""


def read_audio(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    *,
    sampling_rate: int | None = 16_000,
    mono: bool = True,
    max_seconds: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    backend: Backend = "soxr",
) -> tuple[Samples, int]:
    """Read one audio file as float32 samples, full scale being -1 to 1.

    - The content decides the format (wav with 8- to 32-bit integers or floats, flac, Ogg Vorbis and Opus, mp3), not the
      file's name.
    - Several channels are averaged to one (opposite ones cancel out), or kept.
    - Clipped audio is returned as it is: what was cut off cannot be known. Nothing is normalised. Samples of float
      files and of lossy formats may exceed full scale, and so may, slightly, the result of resampling.

    Args:
        source: a path, the encoded bytes, or a binary file (read from where it stands, left open).
        sampling_rate: samples per second of the result, or None for the file's own.
        mono: whether to average the channels.
        max_seconds: refuse longer audio. Checked against the header, and again while decoding. None: no limit.
        start, end: the stretch of the file that is read, in seconds; ``end`` None: to the file's. An end of up to
            :data:`SLACK` seconds behind it is its end. What is before and after isn't decoded, nor counts for
            ``max_seconds``.
        backend: what resamples, as :func:`resample` says.

    Returns:
        The samples, of shape [samples], or [channels, samples] with ``mono=False``; and their sampling rate in Hz.

    Raises:
        AudioError: the file is missing, unreadable, no audio of these formats, cut short, damaged, without samples, too
            long, has samples that are NaN or infinite, or a sampling rate outside :data:`SAMPLING_RATES`; or the
            stretch reaches beyond it.
        ValueError: ``sampling_rate`` is outside :data:`SAMPLING_RATES`, or ``start`` and ``end`` are no stretch.
    """
    if sampling_rate is not None:
        _check_rate(sampling_rate, "sampling_rate")
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"a stretch is from start >= 0 to an end behind it, not from {start} to {end}")
    name, file, opened = _open(source)
    try:
        audio, rate = _decode(name, file, mono, max_seconds, (start, end))
    finally:
        if opened:
            file.close()
    if not np.isfinite(audio).all():
        bad = np.flatnonzero(~np.isfinite(audio).all(axis=0))
        raise AudioError(f"{name}: {len(bad)} samples are NaN or infinite, the first at {start + bad[0] / rate:.3f} s")
    if sampling_rate is not None and sampling_rate != rate:
        audio = np.asarray(resample(audio, rate, sampling_rate, backend=backend), np.float32)
        rate = sampling_rate
        if audio.shape[1] == 0:
            raise AudioError(f"{name}: is too short to hold one sample at {sampling_rate} Hz")
    return (audio[0] if mono else audio), rate


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says.

    Attributes:
        seconds: how long it is; of an mp3 without a length in its header, and of a wav that was streamed, an estimate.
        sampling_rate: in Hz. channels: how many.
        format: one of :data:`FORMATS`.
    """

    seconds: float
    sampling_rate: int
    channels: int
    format: str


def audio_info(source: str | os.PathLike[str] | bytes | BinaryIO) -> AudioInfo:
    """What an audio file's header says, and whether the file is as long as that: nothing is decoded.

    Raises:
        AudioError: as :func:`read_audio`, save for what shows in the samples alone.
    """
    name, file, opened = _open(source)
    try:
        with _sound(name, file) as sound:
            if not sound.frames:
                raise AudioError(f"{name}: holds no samples")
            rate = int(sound.samplerate)
            return AudioInfo(sound.frames / rate, rate, sound.channels, _CONTAINERS[sound.format])
    finally:
        if opened:
            file.close()


def resample(
    audio: npt.NDArray[np.floating],
    original_rate: int,
    sampling_rate: int,
    *,
    quality: Literal["QQ", "LQ", "MQ", "HQ", "VHQ"] = "HQ",
    backend: Backend = "soxr",
) -> npt.NDArray[np.floating]:
    """Change the sampling rate with a band-limited, linear-phase filter.

    Sample ``n`` of the result lies at ``n / sampling_rate`` seconds, as it does in the input: there is no delay.

    Args:
        audio: float32 or float64, of shape [samples] or [channels, samples].
        original_rate: its sampling rate in Hz.
        sampling_rate: the rate wanted.
        quality: one of SoX's. ``HQ`` adds less than 2e-6 of full scale to a tone, ``VHQ`` on float64 less than 1e-8.
            Both fall gently towards the lower of the two Nyquist frequencies: by less than 3e-6 at 0.3 of it, 1e-3 at
            0.9.
        backend: the SoX resampler; or torchaudio's sinc under a Kaiser window, computed in float64, which has one
            quality: less than 1e-7 is added to a tone in float64, and nothing falls up to 0.9.

    Returns:
        An array of the same type and number of axes, ``round(samples * sampling_rate / original_rate)`` long, give or
        take one.

    Raises:
        ValueError: a rate outside :data:`SAMPLING_RATES`, or another shape, type, backend, or quality of torchaudio's.
        FtError: torchaudio is asked for, and missing or made for another torch.
    """
    if backend not in ("soxr", "torchaudio") or (backend == "torchaudio" and quality != "HQ"):
        raise ValueError(f"backend is soxr or torchaudio, which has no quality but HQ; not {backend} with {quality}")
    _check_rate(original_rate, "original_rate")
    _check_rate(sampling_rate, "sampling_rate")
    if audio.dtype not in (np.float32, np.float64) or audio.ndim not in (1, 2):
        raise ValueError(
            "audio is float32 or float64 of shape [samples] or [channels, samples], "
            f"not {audio.dtype} of shape {list(audio.shape)}"
        )
    if original_rate == sampling_rate:
        return audio.copy()
    if backend == "torchaudio":
        return by_torchaudio(audio, original_rate, sampling_rate)
    # soxr wants [samples, channels]
    return np.ascontiguousarray(soxr.resample(np.ascontiguousarray(audio.T), original_rate, sampling_rate, quality).T)


def write_audio(
    path: str | os.PathLike[str],
    audio: npt.NDArray[np.floating],
    sampling_rate: int,
    *,
    subtype: str | None = None,
    clip: bool = False,
) -> None:
    """Write samples to a file in the format that its ending names; the file appears whole or not at all.

    Args:
        path: ends in ``.wav``, ``.flac``, ``.ogg`` or ``.mp3``. An existing file is replaced.
        audio: floats of shape [samples] or [channels, samples], full scale being -1 to 1.
        sampling_rate: in Hz.
        subtype: one of libsndfile's encodings for the format (``PCM_16``, ``PCM_24``, ``FLOAT``, ``VORBIS``, …); unset
            means its default, 16-bit for wav and flac.
        clip: whether samples beyond full scale may be cut off; otherwise they are refused (``FLOAT`` and ``DOUBLE``
            keep them).

    Raises:
        AudioError: nothing to write, samples that are NaN, infinite or beyond full scale, an ending, encoding or rate
            that the format doesn't have, or a file that cannot be written.
    """
    target = Path(path)
    format = target.suffix.lower().lstrip(".")
    if format not in FORMATS:
        raise AudioError(f"{target}: the ending says the format, one of {', '.join('.' + f for f in FORMATS)}")
    if audio.ndim not in (1, 2) or audio.size == 0 or not np.issubdtype(audio.dtype, np.floating):
        raise AudioError(
            f"{target}: audio is floats of shape [samples] or [channels, samples], at least one; "
            f"not {audio.dtype} of shape {list(audio.shape)}"
        )
    if not np.isfinite(audio).all():
        raise AudioError(f"{target}: some samples are NaN or infinite")
    peak = float(np.abs(audio).max())
    if peak > 1 and not clip and subtype not in ("FLOAT", "DOUBLE"):
        raise AudioError(
            f"{target}: the peak is {peak:.3f}, beyond full scale: scale the audio down, "
            "or say clip=True, or subtype='FLOAT' with .wav"
        )
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, audio.T, sampling_rate, format=format.upper(), subtype=subtype)
    except _SOUND_ERRORS as error:
        raise AudioError(
            f"{target}: {format} with {subtype or 'its default'} at {sampling_rate} Hz: {error}"
        ) from error
    _replace(target, buffer.getbuffer())


def _check_rate(rate: int, what: str) -> None:
    if int(rate) != rate or int(rate) not in SAMPLING_RATES:
        raise ValueError(f"{what} is a whole number of Hz from {SAMPLING_RATES[0]} to {SAMPLING_RATES[-1]}, not {rate}")


def _open(source: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[str, BinaryIO, bool]:
    """A name for messages, a seekable file, and whether it was opened here."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"audio of {len(source)} bytes", io.BytesIO(source), True
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        try:
            file = open(source, "rb", opener=_open_without_waiting)  # noqa: SIM115
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise AudioError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise AudioError(f"{name}: is not a file")
        return name, file, True
    if not callable(getattr(source, "read", None)):
        raise TypeError(f"audio is a path, bytes or a binary file, not {type(source).__name__}")
    label = getattr(source, "name", None)
    name = label if isinstance(label, str) else "audio file object"
    data = source.read()
    if not isinstance(data, bytes):
        raise AudioError(f"{name}: gives {type(data).__name__}, not bytes: open it in binary mode ('rb')")
    return name, io.BytesIO(data), True


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a named pipe at once instead of waiting for a writer; it is refused as no file a moment later."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decode(
    name: str, file: BinaryIO, mono: bool, max_seconds: float | None, stretch: tuple[float, float | None]
) -> tuple[Samples, int]:
    """All samples of a stretch as [channels, samples] (one channel if ``mono``), at the file's own rate."""
    with _sound(name, file) as sound:
        rate = int(sound.samplerate)
        first, last = _bounds(name, sound, *stretch)
        _check_length(name, last - first, rate, max_seconds)
        blocks, done = [], 0
        try:
            _go_to(sound, first)
            wanted = (
                _BLOCK if stretch[1] is None else min(_BLOCK, last - first)
            )  # to the end of the file, whatever its header says
            while wanted and len(block := sound.read(wanted, dtype="float32", always_2d=True)):
                done += len(block)
                _check_length(name, done, rate, max_seconds)
                # Averaged in float64: a sum of float32 would round once a channel.
                blocks.append(block.mean(axis=1, dtype=np.float64).astype(np.float32)[None] if mono else block.T)
                wanted = _BLOCK if stretch[1] is None else min(_BLOCK, last - first - done)
        except _SOUND_ERRORS as error:
            at = (first + done) / rate
            raise AudioError(f"{name}: is cut short or damaged after {at:.1f} s: {error}") from error
        if done < last - first:
            raise AudioError(
                f"{name}: is cut short or damaged: {first + done} of {sound.frames} samples can be decoded"
            )
    if not blocks:
        raise AudioError(f"{name}: holds no samples")
    return np.concatenate(blocks, axis=1), rate


@contextmanager
def _sound(name: str, file: BinaryIO) -> Iterator[soundfile.SoundFile]:
    """A file whose header is in order, ready to be decoded."""
    if file.seek(0, os.SEEK_END) == 0:
        raise AudioError(f"{name}: is empty")
    if missing := missing_bytes(file):
        raise AudioError(f"{name}: is cut short: {missing} bytes or more are missing at its end")
    file.seek(0)
    try:
        sound = soundfile.SoundFile(_Nameless(file))
    except _SOUND_ERRORS as error:
        raise AudioError(f"{name}: is no readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from error
    with sound:
        if sound.format not in _CONTAINERS:
            raise AudioError(f"{name}: is a {sound.format} file; read are {', '.join(FORMATS)}: convert it")
        if sound.samplerate not in SAMPLING_RATES:
            raise AudioError(f"{name}: its header says {sound.samplerate} Hz, which is no sampling rate of audio")
        yield sound


def _go_to(sound: soundfile.SoundFile, sample: int) -> None:
    """Seek a sample. Within the last page of an Ogg Vorbis file libvorbisfile may land elsewhere, and says nothing:
    what can lie there is read from a place before it."""
    if not sample:
        return
    place = min(sample, max(0, int(sound.frames) - _VORBIS_PAGE)) if sound.subtype == "VORBIS" else sample
    sound.seek(place)
    while place < sample:
        place += len(sound.read(min(_BLOCK, sample - place), dtype="float32")) or sample


def _bounds(name: str, sound: soundfile.SoundFile, start: float, end: float | None) -> tuple[int, int]:
    """The first sample of a stretch, and the one behind its last."""
    rate, frames = int(sound.samplerate), int(sound.frames)
    first, last = round(start * rate), frames if end is None else round(end * rate)
    if last > frames + SLACK * rate or (first and first >= frames):
        at = f"starts at {start:g}" if first >= frames else f"ends at {end:g}"
        raise AudioError(f"{name}: has {frames / rate:.2f} s, and the stretch {at} s")
    return first, min(last, frames)


class _Nameless:
    """A file without its name, from whose ending soundfile would conclude a format."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.readinto, self.seek, self.tell = file.read, file.readinto, file.seek, file.tell  # type: ignore[attr-defined]


def _check_length(name: str, frames: int, rate: int, max_seconds: float | None) -> None:
    if max_seconds is not None and frames > max_seconds * rate:
        raise AudioError(f"{name}: is longer than {max_seconds:g} s (max_seconds)")


def _replace(target: Path, data: memoryview) -> None:
    """Write beside the target, flush, rename."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise AudioError(f"{target}: cannot be written: {error.strerror or error}") from error
