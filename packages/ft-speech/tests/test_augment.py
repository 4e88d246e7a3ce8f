"""What augmentation does to samples and features, by numbers that follow from its settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ft_speech.listening.augment import mask_features, vary_samples
from ft_speech.listening.settings import AugmentSettings

RATE = 16_000


def settings(**keys: Any) -> AugmentSettings:
    return AugmentSettings.model_validate(keys)


def tone(frequency: float, seconds: float = 2) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize("ratio", [-5.0, 0.0, 20.0, 40.0])
def test_noise_is_white_and_as_loud_as_was_drawn(ratio: float) -> None:
    samples = tone(440)
    noisy = vary_samples(samples, RATE, settings(noise=[ratio, ratio]), np.random.default_rng(1))
    noise = noisy.astype(np.float64) - samples
    power = np.mean(np.square(samples, dtype=np.float64)) / np.mean(np.square(noise))
    # The mean of n squares of a normal scatters by sqrt(2 / n): five of these, in dB.
    assert abs(10 * np.log10(power) - ratio) < 5 * np.sqrt(2 / len(noise)) * 10 / np.log(10)
    halves = np.square(np.abs(np.fft.rfft(noise)))[1:-1].reshape(-1)
    low, high = np.split(halves[: len(halves) // 2 * 2], 2)
    assert abs(low.mean() / high.mean() - 1) < 5 * np.sqrt(2 / len(low))  # exponential: each mean by 1 / sqrt(n)


def test_noise_is_drawn_from_the_whole_range() -> None:
    samples, found = tone(440, 0.5), []
    for seed in range(60):
        noise = vary_samples(samples, RATE, settings(noise=[10, 30]), np.random.default_rng(seed)) - samples
        found.append(10 * np.log10(np.mean(np.square(samples)) / np.mean(np.square(noise, dtype=np.float64))))
    assert 9.5 < min(found) < 13
    assert 27 < max(found) < 30.5


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speed_changes_length_and_pitch_by_its_factor(factor: float) -> None:
    faster = vary_samples(tone(1000), RATE, settings(speed=[factor, factor]), np.random.default_rng(0))
    assert abs(len(faster) - 2 * RATE / factor) <= 1
    inner = faster[len(faster) // 4 : -len(faster) // 4].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    peak = np.argmax(spectrum) * RATE / len(inner)
    assert abs(peak - 1000 * factor) <= RATE / len(inner)  # a bin
    kept = vary_samples(tone(1000), RATE, settings(speed=[0.9, 0.9]), np.random.default_rng(0), speed=False)
    assert np.array_equal(kept, tone(1000))


def test_masks_are_no_wider_than_the_policy_and_hold_the_mean() -> None:
    frames, padded = 300, 400
    bands = np.zeros(80, int)
    widest_band = longest = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        features = chance.standard_normal((80, padded)).astype(np.float32)
        features[:, frames:] = -7  # what a recording is filled up with
        given = features.copy()
        made = mask_features(features, frames, settings(spec=True), chance)
        assert np.array_equal(features, given)  # it is a copy that is masked
        assert np.array_equal(made[:, frames:], given[:, frames:])
        changed = (made != given)[:, :frames]
        mean = given[:, :frames].mean()
        assert (made[:, :frames][changed] == mean).all()
        rows, columns = changed.all(axis=1), changed.all(axis=0)
        assert np.array_equal(changed, rows[:, None] | columns[None])
        # Two masks each, of at most 27 of 80 bands, and at most a fifth of the frames, which is less than 100.
        assert rows.sum() <= 2 * 27
        assert columns.sum() <= 2 * 60
        widest_band, longest = max(widest_band, rows.sum()), max(longest, columns.sum())
        bands += rows
    assert widest_band > 27  # both masks are there
    assert longest > 60
    assert bands.min() > 0  # any band may be masked


def test_the_same_chance_gives_the_same_and_nothing_asked_for_changes_nothing() -> None:
    every = settings(spec=True, noise=[5, 20], speed=[0.9, 1.1])
    samples, features = tone(440), np.random.default_rng(0).standard_normal((80, 200)).astype(np.float32)
    first, second, other = (vary_samples(samples, RATE, every, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first[:1000], other[:1000])
    masks = [mask_features(features, 200, every, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])
    assert np.array_equal(vary_samples(samples, RATE, settings(), np.random.default_rng(0)), samples)
    assert np.array_equal(mask_features(features, 200, settings(), np.random.default_rng(0)), features)


def test_silence_and_nothing() -> None:
    silent = vary_samples(np.zeros(RATE, np.float32), RATE, settings(noise=[10, 10]), np.random.default_rng(0))
    assert not silent.any()  # noise is by a ratio to nothing
    assert mask_features(np.zeros((80, 5), np.float32), 0, settings(spec=True), np.random.default_rng(0)).shape == (
        80,
        5,
    )
