"""Silence at the ends of recordings, and what was cut off at their loudest."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["CLIPPED", "clipped_share", "sounding", "trim_silence", "without_ends"]

Samples: TypeAlias = npt.NDArray[np.floating]

WINDOW = 0.01
"""Seconds of which the loudness is taken."""
FLAT = 4
"""Successive equal samples at the loudest value that are taken for a peak that was cut off."""
CLIPPED = 0.001
"""The share of samples in such peaks from which a recording is called clipped."""


def sounding(samples: Samples, sampling_rate: int, *, threshold_db: float = 40.0) -> tuple[int, int] | None:
    """Where a recording is not silent: its first sample, and the one behind its last; None where it is all zeros.

    Windows of 10 ms whose energy lies more than a threshold below that of the loudest are silence. So the result does
    not change with the recording's level, and a steady noise is no silence.

    Args:
        samples: mono, [samples]. sampling_rate: in Hz.
        threshold_db: in dB, above 0.

    Raises:
        ValueError: another shape, or a threshold that isn't above 0.
    """
    if samples.ndim != 1:
        raise ValueError(f"silence is looked for in mono audio, [samples], not in {list(samples.shape)}")
    if not threshold_db > 0:
        raise ValueError(f"threshold_db is above 0, not {threshold_db}")
    if not len(samples):
        return None
    window = max(1, round(WINDOW * sampling_rate))
    starts = np.arange(0, len(samples), window)
    sums = np.add.reduceat(np.square(samples, dtype=np.float64), starts)
    energy = sums / np.minimum(window, len(samples) - starts)  # the last window may be short
    loudest = energy.max()
    if loudest == 0:
        return None
    loud = np.flatnonzero(energy > loudest * 10 ** (-threshold_db / 10))
    return int(starts[loud[0]]), min(len(samples), int(starts[loud[-1]]) + window)


def trim_silence(samples: Samples, sampling_rate: int, *, threshold_db: float = 40.0, margin: float = 0.05) -> Samples:
    """A recording without the silence at its beginning and end (:func:`sounding`).

    Args:
        samples: mono, [samples]. sampling_rate: in Hz.
        threshold_db: how far below the loudest 10 ms silence begins, in dB.
        margin: seconds of it that are kept at each end.

    Returns:
        a view of ``samples``; empty where all of them are zero.

    Raises:
        ValueError: as :func:`sounding`; or a margin below 0.
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is a number of seconds of at least 0, not {margin}")
    found = sounding(samples, sampling_rate, threshold_db=threshold_db)
    if found is None:
        return samples[:0]
    kept = round(margin * sampling_rate)
    return samples[max(0, found[0] - kept) : found[1] + kept]


def without_ends(samples: Samples, sampling_rate: int, decibels: float | None) -> Samples:
    """What the settings ``trim_silence`` do: :func:`trim_silence` with its margin; nothing where ``decibels`` is None,
    and to a recording of zeros alone, of which nothing would be left."""
    made = samples if decibels is None else trim_silence(samples, sampling_rate, threshold_db=decibels)
    return made if len(made) else samples


def clipped_share(samples: Samples) -> float:
    """The share of samples that lie in flat peaks: four or more successive ones, all the highest or all the lowest.

    Of a recording that was cut off at its loudest this is above :data:`CLIPPED`, also where it was made quieter later;
    of others near 0. Lossy formats hide it.
    """
    if not len(samples) or samples.max() == samples.min():  # silence is no peak
        return 0.0
    count = 0
    for extreme in (samples.max(), samples.min()):
        at = np.flatnonzero(np.diff(np.concatenate(([False], samples == extreme, [False]))))
        runs = at[1::2] - at[::2]
        count += int(runs[runs >= FLAT].sum())
    return count / len(samples)
