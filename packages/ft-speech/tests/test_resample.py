"""The resampler against the analytic signal, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from ft_speech import resample

PAIRS = [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (22_050, 24_000), (16_000, 44_100), (24_000, 8_000)]


def tone(frequency: float, rate: int, length: int, phase: float = 0.3) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(length) / rate + phase)


# SoX's HQ computes with 20 bits, VHQ with 28; twice that rounding is allowed for its several filter stages.
NOISE = {"HQ": 2**-19, "VHQ": 2**-27}


@pytest.mark.parametrize("quality", NOISE)
@pytest.mark.parametrize(("original", "wanted"), PAIRS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_tone_is_the_same_tone(original: int, wanted: int, share: float, quality: str) -> None:
    """Same frequency, same phase, same amplitude up to the filter's gentle fall, and nothing added."""
    frequency = share * min(original, wanted) / 2
    result = resample(tone(frequency, original, original), original, wanted, quality=quality)  # type: ignore[arg-type]
    assert len(result) == wanted
    inner = slice(len(result) // 4, -len(result) // 4)
    exact = np.stack([tone(frequency, wanted, len(result)), tone(frequency, wanted, len(result), 0.3 + np.pi / 2)], 1)
    (in_phase, quadrature), *_ = np.linalg.lstsq(exact[inner], result[inner], rcond=None)
    assert np.abs(result - exact @ (in_phase, quadrature))[inner].max() < NOISE[quality]
    assert abs(np.arctan2(quadrature, in_phase)) < NOISE[quality]  # radians: no delay
    assert abs(np.hypot(in_phase, quadrature) - 1) < (1e-3 if share > 0.3 else 2e-7 + NOISE[quality])


@pytest.mark.parametrize(("original", "wanted"), [(44_100, 16_000), (48_000, 16_000), (24_000, 8_000)])
def test_what_lies_above_is_removed_not_folded(original: int, wanted: int) -> None:
    result = resample(tone(0.6 * wanted, original, original), original, wanted)
    assert np.abs(result[len(result) // 4 : -len(result) // 4]).max() < 2**-19


def test_an_impulse_stays_where_it_is() -> None:
    signal = np.zeros(8_000)
    signal[4_000] = 1
    assert np.argmax(resample(signal, 8_000, 16_000)) == 8_000


def test_float32_and_channels() -> None:
    stereo = np.stack([tone(440, 48_000, 48_000), tone(880, 48_000, 48_000)]).astype(np.float32)
    result = resample(stereo, 48_000, 16_000)
    assert result.dtype == np.float32
    assert result.shape == (2, 16_000)
    assert result.flags["C_CONTIGUOUS"]
    for channel in range(2):
        # Channels apart and together: the same filter, in float32.
        assert np.abs(result[channel] - resample(stereo[channel], 48_000, 16_000)).max() < 1e-6


def test_the_same_rate_is_a_copy() -> None:
    signal = tone(440, 16_000, 100)
    result = resample(signal, 16_000, 16_000)
    assert np.array_equal(result, signal)
    assert not np.shares_memory(result, signal)


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_a_few_samples(length: int) -> None:
    assert len(resample(np.zeros(length), 8_000, 16_000)) == 2 * length


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="original_rate is a whole number of Hz"):
        resample(np.zeros(4), 16_000.5, 8_000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling_rate is a whole number of Hz"):
        resample(np.zeros(4), 16_000, 0)
    with pytest.raises(ValueError, match=r"not int16 of shape \[4\]"):
        resample(np.zeros(4, np.int16), 16_000, 8_000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \[1, 1, 4\]"):
        resample(np.zeros((1, 1, 4)), 16_000, 8_000)
