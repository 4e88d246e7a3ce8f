"""Mel-cepstral distortion against what its formula says of known cases."""

from __future__ import annotations

import numpy as np
import pytest

from ft_speech.speaking.distortion import BANDS, aligned, mel_cepstra, mel_cepstral_distortion

RATE = 16_000


def noise(seed: int, seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=int(seconds * RATE)) / 10


def test_the_same_is_at_no_distance_and_another_is() -> None:
    one = np.cumsum(noise(0)) / 30
    assert mel_cepstral_distortion(one, one, RATE) < 1e-4
    assert mel_cepstral_distortion(one, noise(1), RATE) > 3


def test_loudness_makes_no_difference() -> None:
    """Twice the amplitude adds ln 2 to every band's logarithm, which is the coefficient 0 alone; what is left is the
    floor of the powers, 1e-7 beside those of noise of variance 0.01."""
    assert mel_cepstral_distortion(noise(0), 2 * noise(0), RATE) < 1e-2
    louder = mel_cepstra(2 * noise(0), RATE) - mel_cepstra(noise(0), RATE)
    assert louder[5:-5, 0] == pytest.approx(np.log(2), abs=1e-4)


def test_all_coefficients_together_are_the_distance_of_the_spectra() -> None:
    """Parseval: the mean square over the bands of two logarithms' difference is d_0 ** 2 + 2 * sum(d_k ** 2)."""
    difference = (mel_cepstra(noise(0), RATE, BANDS - 1) - mel_cepstra(noise(1), RATE, BANDS - 1))[10]
    places = (np.arange(BANDS) + 0.5) / BANDS
    logs = difference[0] + 2 * sum(difference[d] * np.cos(np.pi * d * places) for d in range(1, BANDS))
    assert (logs**2).mean() == pytest.approx(difference[0] ** 2 + 2 * (difference[1:] ** 2).sum(), rel=1e-9)


def test_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cepstra that differ by 0.1 in one coefficient are at 10 / ln 10 * sqrt(2) * 0.1 = 0.614 dB (Kubichek 1993)."""
    import ft_speech.speaking.distortion as module

    frames = iter([np.zeros((4, 14)), np.eye(14)[[3] * 4] * 0.1])
    monkeypatch.setattr(module, "mel_cepstra", lambda samples, rate: next(frames))
    assert module.mel_cepstral_distortion(noise(0), noise(0), RATE) == pytest.approx(0.61418, abs=1e-5)


def test_pauses_that_are_longer_cost_little() -> None:
    voice = np.cumsum(noise(0, 0.3)) / 30
    pause = np.zeros(RATE // 5)
    one, other = np.concatenate([voice, pause, voice]), np.concatenate([voice, pause, pause, voice])
    unaligned = mel_cepstra(one, RATE)[:, 1:], mel_cepstra(other, RATE)[: len(mel_cepstra(one, RATE)), 1:]
    plain = (10 / np.log(10) * np.sqrt(2 * ((unaligned[0] - unaligned[1]) ** 2).sum(1))).mean()
    assert mel_cepstral_distortion(one, other, RATE) < plain / 4


def test_the_path_is_the_cheapest_of_all() -> None:
    costs = np.random.default_rng(0).random((5, 6))

    def cheapest(i: int, j: int) -> float:
        before = [cheapest(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        return float(costs[i, j]) + (min(before) if before else 0)

    path = aligned(costs)
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [4, 5]
    assert {tuple(step) for step in np.diff(path, axis=0).tolist()} <= {(0, 1), (1, 0), (1, 1)}
    assert costs[path[:, 0], path[:, 1]].sum() == pytest.approx(cheapest(4, 5))


def test_nothing_has_no_distortion() -> None:
    with pytest.raises(ValueError, match="without samples"):
        mel_cepstral_distortion(np.zeros(0), noise(0), RATE)
