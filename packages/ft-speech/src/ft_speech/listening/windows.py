"""Long recordings cut at their pauses, into windows that a recogniser hears at once."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FRAME", "PAUSE", "SPREAD", "at_pauses", "is_silent"]

Samples: TypeAlias = npt.NDArray[np.float32]

PAUSE = 0.3
"""Seconds over which loudness is averaged where a recording is to be cut: the pause between sentences is longer, the
closure of a consonant, 0.05 to 0.15 s, is not."""

FRAME = 0.02
"""Seconds of the frames in which loudness is measured."""

SPREAD = 0.25
"""A window may be shorter or longer than an even share of the recording by this part of it."""

SILENT = 2.0**-15
"""Full scale being 1, one step of 16 bits: what never exceeds it is no recording of anything."""


def at_pauses(samples: Samples, sampling_rate: int, longest: float) -> list[tuple[int, int]]:
    """Where to cut a recording: the first sample of each window, and the one after its last.

    The windows follow each other without overlap or gap. Their number is the least that ``longest`` allows, or a little
    more; each is cut where, around an even share of what is left, the loudness of ``PAUSE`` seconds is least. So a word
    is cut in two only where nobody pauses for a quarter of a window; no text has to be merged; and each window can be
    heard without knowing what is said in another.

    Args:
        samples: of one channel, ``[samples]``.
        sampling_rate: in Hz.
        longest: seconds of a window at most.
    """
    most = int(longest * sampling_rate)
    if most < 1:
        raise ValueError(f"longest is {longest} s: not one sample at {sampling_rate} Hz")
    if len(samples) <= most:
        return [(0, len(samples))] if len(samples) else []
    frame = max(round(FRAME * sampling_rate), 1)
    level = _loudness(samples, frame, max(round(PAUSE / FRAME), 1))
    windows, start = [], 0
    while len(samples) - start > most:
        left = len(samples) - start
        share = left / math.ceil(left / most)
        first, last = (start + share * (1 - SPREAD)) / frame, min(start + share * (1 + SPREAD), start + most) / frame
        low, high = math.ceil(first), math.floor(last)
        end = _quietest(level, low, high) * frame if high > low and high < len(level) else start + most
        windows.append((start, end))
        start = end
    return [*windows, (start, len(samples))]


def is_silent(samples: Samples) -> bool:
    """Whether a recording holds nothing at all, as between a file's tracks; quiet speech is not silent."""
    return not len(samples) or float(np.abs(samples).max()) <= SILENT


def _loudness(samples: Samples, frame: int, width: int) -> npt.NDArray[np.float64]:
    """The mean power around each frame's beginning, of ``width`` frames."""
    count = len(samples) // frame
    framed = samples[: count * frame].reshape(count, frame)
    power = np.einsum("ij,ij->i", framed, framed, dtype=np.float64) / frame
    before = width // 2
    return np.convolve(np.pad(power, (before, width - before), mode="edge"), np.full(width, 1 / width), "valid")[:count]


def _quietest(level: npt.NDArray[np.float64], low: int, high: int) -> int:
    """The frame of the least loudness from ``low`` to ``high``; of several, as in digital silence, the middle one."""
    part = level[low : high + 1]
    lowest = np.flatnonzero(part <= part.min())
    return low + int(lowest[len(lowest) // 2])
