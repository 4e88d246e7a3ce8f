"""Audio of held-out rows for a proof: what a training hears, near enough, or sounds that are made in its place.

A training reads audio by ft-speech, which this package does without. Both sides of a proof get the same samples, so
that another resampler than the training's changes nothing in it.
"""

from __future__ import annotations

import base64
import io
import math
import os
import stat
import wave
from typing import TYPE_CHECKING, Any, NamedTuple

from ft_export.errors import ExportError
from ft_export.samples import Row

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["LONGEST", "MAX_BYTES", "NotHeardError", "Sound", "make_sound", "open_sound", "sound_of"]

LONGEST = 30.0
"""Seconds of a sound in a proof, at most: what a Whisper hears at once."""
MAX_BYTES = 256 * 1024 * 1024
"""Of an encoded file, at most."""
RATES = (1_000, 768_000)
"""Samples per second that a file may have."""


class NotHeardError(ExportError):
    """Audio that a proof does not read; the message is of the form "a URL, which is not fetched"."""


class Sound(NamedTuple):
    """A sound of a proof.

    Attributes:
        samples: mono, ``[samples]``, float32, full scale -1 to 1. made: in the place of what it was made, such as "a
            URL, which is not fetched"; nothing: it is the row's own.
    """

    samples: npt.NDArray[np.float32]
    made: str


def sound_of(row: Row, rate: int, longest: float = LONGEST, seed: int = 0) -> Sound:
    """A row's audio at ``rate``, its stretch from ``start`` to ``end`` where it names one; else a sound that is made.

    Args:
        longest: seconds; what is longer is cut. seed: of what is made.
    """
    reference = row.get("audio")
    try:
        if not isinstance(reference, str):
            raise NotHeardError("a row without audio")
        start, end = (row.get(name) for name in ("start", "end"))
        numbers = [float(one) if isinstance(one, int | float) else None for one in (start, end)]
        return Sound(open_sound(reference, rate, numbers[0] or 0.0, numbers[1], longest), "")
    except NotHeardError as error:  # moved since training, say: the proof only needs some sound
        return Sound(make_sound(min(longest, 2.0 + seed % 5), rate, seed), str(error))


def open_sound(
    reference: str, rate: int, start: float = 0.0, end: float | None = None, longest: float = LONGEST
) -> npt.NDArray[np.float32]:
    """The audio that a row's reference names: mono, at ``rate``, ``[samples]``.

    Args:
        reference: a path, or a ``data:`` URL with base64. start, end: of the stretch, in seconds.

    Raises:
        NotHeardError: it is a URL; the file is not there, too large, damaged, empty or of a format not read here.
    """
    last = start + longest if end is None else min(end, start + longest)
    samples, was = _decoded(_data(reference), last)
    if not RATES[0] <= was <= RATES[1]:
        raise NotHeardError(f"a file of {was} samples per second")
    samples = samples[max(0, round(start * was)) : max(0, round(last * was))]
    if not samples.size:
        raise NotHeardError("an empty stretch")
    return _resampled(samples, was, rate)


def _data(reference: str) -> bytes:
    """The encoded bytes."""
    if reference.lower().startswith(("http://", "https://")):
        raise NotHeardError("a URL, which is not fetched")
    if reference.startswith("data:"):
        head, _, body = reference.partition(",")
        try:
            data = base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
        except ValueError as error:
            raise _damaged() from error
    else:
        try:
            if not stat.S_ISREG(os.stat(reference).st_mode):  # a named pipe would be waited for
                raise NotHeardError("what is not a file")
            with open(reference, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise NotHeardError("a file that cannot be opened") from error
    if len(data) > MAX_BYTES:
        raise NotHeardError(f"a file of more than {MAX_BYTES:,} bytes")
    return data


def _decoded(data: bytes, last: float) -> tuple[npt.NDArray[np.float32], int]:
    """Mono samples up to the second ``last``, and their rate: by soundfile where it is installed, else WAV with whole
    numbers alone."""
    from importlib.util import find_spec

    import numpy as np

    if find_spec("soundfile") is not None:
        import soundfile

        try:
            with soundfile.SoundFile(io.BytesIO(data)) as sound:
                rate = sound.samplerate
                wanted = max(1, math.ceil(last * min(rate, RATES[1])))  # a small file may hold hours of silence
                samples = sound.read(wanted, dtype="float32", always_2d=True)
        except (RuntimeError, ValueError, TypeError) as error:  # soundfile's own error is a RuntimeError
            raise _damaged() from error
        return _mono(samples), int(rate)
    if data[:4] != b"RIFF":
        raise NotHeardError("a file that is not read without soundfile (pip install soundfile)")
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise _damaged() from error
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width == 1:  # unsigned, unlike all others
        values: Any = np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    elif width in (2, 4):
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    elif width == 3:
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3).astype(np.int32)
        whole = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
        values = ((whole ^ 1 << 23) - (1 << 23)).astype(np.float32) / 2**23
    else:
        raise NotHeardError(f"a file of {8 * width} bits a sample")
    return _mono(values.reshape(-1, channels)), rate


def _mono(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    mixed: npt.NDArray[np.float32] = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mixed).all():
        raise _damaged()
    return mixed


def _resampled(samples: npt.NDArray[np.float32], was: int, rate: int) -> npt.NDArray[np.float32]:
    """In the frequency domain: what both rates can hold stays, the rest goes."""
    import numpy as np

    if was == rate:
        return samples
    count = max(1, round(samples.size * rate / was))
    spectrum = np.fft.rfft(samples.astype(np.float64))
    kept = np.zeros(count // 2 + 1, complex)
    both = min(kept.size, spectrum.size)
    kept[:both] = spectrum[:both]
    return (np.fft.irfft(kept, count) * (count / samples.size)).astype(np.float32)


def make_sound(seconds: float, rate: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Something like a voice: gliding harmonics in syllables with pauses and a little noise; ``[samples]``, float32."""
    import numpy as np

    chance = np.random.default_rng(seed)
    count = max(1, round(seconds * rate))
    time = np.arange(count) / rate
    samples = 0.002 * chance.standard_normal(count)
    begin = 0.05
    while begin < seconds:
        length = chance.uniform(0.08, 0.35)
        inside = (time >= begin) & (time < begin + length)
        local = time[inside] - begin
        pitch, glide = chance.uniform(90, 260), chance.uniform(-120, 120)
        phase = 2 * math.pi * (pitch * local + glide * local**2 / 2)
        peak = chance.uniform(300, 2500)
        for harmonic in range(1, 16):
            near = math.exp(-(((harmonic * pitch - peak) / 500) ** 2)) + 0.15 / harmonic
            if harmonic * pitch < 0.45 * rate:
                samples[inside] += 0.2 * near * np.sin(harmonic * phase) * np.sin(math.pi * local / length)
        begin += length + chance.uniform(0.02, 0.3)
    return np.clip(samples, -1, 1).astype(np.float32)


def _damaged() -> NotHeardError:
    return NotHeardError("a file that is no audio or is damaged")
