"""Recordings of rows as a model learns to speak them: resampled, trimmed, and looked at whether they are clipped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ft_core.console import counted
from ft_speech.audio import AudioError, audio_info, read_audio, resample
from ft_speech.references import audio_name, source_of
from ft_speech.silence import CLIPPED, clipped_share, without_ends

__all__ = ["Recording", "clipped_line", "key_of", "read_recording"]


SILENCE = 60.0
"""Seconds of silence that are read and trimmed beside what may be used."""


class Recording(NamedTuple):
    """What was read of a row.

    Attributes:
        samples: mono, float32 [samples]. clipped: whether its peaks were cut off.
    """

    samples: npt.NDArray[np.float32]
    clipped: bool


def read_recording(
    row: Mapping[str, Any], sampling_rate: int, trim_silence: float | None, most: float = math.inf
) -> Recording:
    """A row's recording as :func:`ft_speech.references.open_row` gives it. Flat peaks are looked for at the file's own
    rate: resampling rounds them.

    Args:
        most: seconds that may be used; of a recording that is longer no more is read than shows that, for a small file
            may hold hours.

    Raises:
        ft_speech.AudioError: as there.
        DataError: as there.
    """
    start, end = row.get("start") or 0.0, row.get("end")
    if trim_silence is not None:
        most += SILENCE
    if end is None and audio_info(source_of(row["audio"])).seconds > start + most + 2:
        end = start + most + 1
        trim_silence = None  # sound may follow: it is too long, whatever its beginning is
    own, rate = read_audio(source_of(row["audio"]), sampling_rate=None, start=start, end=end)
    samples = np.asarray(resample(own, rate, sampling_rate), np.float32)
    if not len(samples):
        name = audio_name(row["audio"])
        raise AudioError(f"{name}: is too short to hold one sample at {sampling_rate} Hz")
    kept = without_ends(samples, sampling_rate, trim_silence)
    if len(kept) < len(samples):
        kept = kept.copy()  # a view would keep all that was read
    return Recording(kept, clipped_share(own) >= CLIPPED)


def key_of(row: Mapping[str, Any]) -> bytes:
    """What tells a row's recording, or the stretch of it that is used, from others."""
    return hashlib.sha256(f"{row['audio']}\0{row.get('start')}\0{row.get('end')}".encode()).digest()


def clipped_line(clipped: int, what: str) -> str | None:
    """What to say of so many clipped recordings of rows that are called so; None of none."""
    if not clipped:
        return None
    return f"clipped: {counted(clipped, f'{what} recording')} cut off at the peaks, which the model learns too"
