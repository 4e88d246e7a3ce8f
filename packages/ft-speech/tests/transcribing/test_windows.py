from __future__ import annotations

import numpy as np
import pytest

from ft_speech.listening.windows import PAUSE, SPREAD, at_pauses, is_silent

RATE = 1000


def speech(pieces: list[tuple[float, float]], seed: int = 0) -> np.ndarray:
    """Noise and pauses in turn, each so many seconds; a pause is a thousand times quieter."""
    chance = np.random.default_rng(seed)
    made = []
    for loud, quiet in pieces:
        made += [chance.standard_normal(round(loud * RATE)), chance.standard_normal(round(quiet * RATE)) / 1000]
    return np.concatenate(made).astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_windows_are_the_recording_and_are_cut_in_its_pauses(seed: int) -> None:
    chance = np.random.default_rng(seed)
    # Somewhere in a quarter of a window, 1.25 s either side of an even share, there is always a whole pause.
    pieces = [(float(chance.uniform(0.3, 1.0)), float(chance.uniform(PAUSE + 0.05, 0.6))) for _ in range(60)]
    samples = speech(pieces, seed)
    windows = at_pauses(samples, RATE, 5.0)
    assert np.array_equal(np.concatenate([samples[a:b] for a, b in windows]), samples)
    assert max(b - a for a, b in windows) <= 5 * RATE
    # The last may be what is left; shares never fall under half a window before.
    assert min(b - a for a, b in windows) >= 2.5 * RATE * (1 - SPREAD)
    edges = np.cumsum([0.0, *(second for piece in pieces for second in piece)])
    pauses = list(zip(edges[1::2], edges[2::2], strict=True))
    for _, end in windows[:-1]:
        assert any(start < end / RATE < stop for start, stop in pauses), end


def test_without_a_pause_it_is_cut_where_it_must_be() -> None:
    samples = np.ones(23_456, np.float32)
    windows = at_pauses(samples, RATE, 5.0)
    assert [a for a, _ in windows[1:]] == [b for _, b in windows[:-1]]
    assert (windows[0][0], windows[-1][1]) == (0, len(samples))
    assert all(0 < b - a <= 5 * RATE for a, b in windows)


def test_digital_silence_is_cut_in_its_middle() -> None:
    samples = speech([(4.0, 0.0), (0.0, 0.0), (4.0, 0.0)])
    samples[3500:4500] = 0
    (_, cut), _ = at_pauses(samples, RATE, 6.0)
    assert 3800 <= cut <= 4200


def test_what_fits_is_one_window_and_nothing_is_none() -> None:
    assert at_pauses(np.ones(5000, np.float32), RATE, 5.0) == [(0, 5000)]
    assert len(at_pauses(np.ones(5001, np.float32), RATE, 5.0)) == 2
    assert at_pauses(np.ones(0, np.float32), RATE, 5.0) == []
    with pytest.raises(ValueError, match="not one sample"):
        at_pauses(np.ones(5, np.float32), RATE, 0.0001)


def test_silence_is_what_never_moves() -> None:
    assert is_silent(np.zeros(100, np.float32))
    assert is_silent(np.full(100, 2.0**-15, np.float32))
    assert not is_silent(np.full(100, 2.0**-14, np.float32))  # very quiet speech
    assert is_silent(np.zeros(0, np.float32))
