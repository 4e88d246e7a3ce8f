"""Recordings varied while they are trained on: speed, noise, and SpecAugment."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_speech.audio import resample

if TYPE_CHECKING:
    from ft_speech.listening.settings import AugmentSettings

__all__ = ["mask_features", "vary_samples"]

Floats: TypeAlias = npt.NDArray[np.float32]

BANDS, WIDEST = 2, 27
"""How many bands of frequency are blanked, and how many of 80 frequencies each has at most."""
STRETCHES, LONGEST, SHARE = 2, 100, 0.2
"""How many stretches of time are, how many frames each has at most, and what share of the recording."""


def vary_samples(
    samples: Floats, sampling_rate: int, settings: AugmentSettings, chance: np.random.Generator, *, speed: bool = True
) -> Floats:
    """Samples at another speed and with noise, as the settings say.

    Args:
        samples: float32 [samples]. sampling_rate: theirs, in Hz.
        chance: a ``numpy.random.Generator``.
        speed: whether the speed may change.
    """
    made = np.asarray(samples, np.float32)
    if settings.speed is not None and speed:
        rate = round(sampling_rate * chance.uniform(*settings.speed))
        made = np.asarray(resample(made, rate, sampling_rate), np.float32)
    if settings.noise is not None:
        ratio = chance.uniform(*settings.noise)
        power = float(np.mean(np.square(made, dtype=np.float64)))
        sigma = np.sqrt(power / 10 ** (ratio / 10))
        made = made + np.float32(sigma) * chance.standard_normal(len(made), np.float32)
    return made


def mask_features(features: Floats, frames: int, settings: AugmentSettings, chance: np.random.Generator) -> Floats:
    """SpecAugment without its time warping: two bands of up to 27 of 80 frequencies, two stretches of up to 1 s and a
    fifth of the recording, filled with the mean (the policy LD of Park et al. 2019, table 1, in smaller stretches).

    Args:
        features: float32 [frequencies, frames], of which the first ``frames`` are the recording's.
    """
    if not settings.spec or frames < 1:
        return features
    made = features.copy()
    mean = features[:, :frames].mean()
    count = len(features)
    for _ in range(BANDS):
        width = int(chance.integers(0, max(1, WIDEST * count // 80) + 1))
        first = int(chance.integers(0, count - width + 1))
        made[first : first + width, :frames] = mean
    for _ in range(STRETCHES):
        width = int(chance.integers(0, min(LONGEST, int(SHARE * frames)) + 1))
        first = int(chance.integers(0, frames - width + 1))
        made[:, first : first + width] = mean
    return made
