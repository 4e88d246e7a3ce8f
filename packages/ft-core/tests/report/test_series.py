"""Thinning, smoothing and axes."""

from __future__ import annotations

import math
import random

import pytest

from ft_core.report.series import downsample, linear_axis, log_axis, smooth


def test_a_short_series_stays_as_it_is() -> None:
    assert downsample([1, 2, 3], [0.5, math.nan, None]) == [(1, 0.5), (2, None), (3, None)]


def test_thinning_keeps_every_peak_and_the_order() -> None:
    dice = random.Random(1)
    xs = list(range(100_000))
    ys = [dice.random() for _ in xs]
    peaks = {7: 50.0, 31_337: -40.0, 99_999: 60.0}
    for at, value in peaks.items():
        ys[at] = value
    points = downsample(xs, ys, 1000)
    assert len(points) == 1000
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert peaks.items() <= dict(points).items()
    assert all(ys[int(x)] == y for x, y in points)


def test_thinning_keeps_a_gap_of_one_point() -> None:
    ys: list[float | None] = [1.0] * 10_000
    ys[5_000] = math.inf
    points = downsample(list(range(10_000)), ys, 1000)
    assert [x for x, y in points if y is None] == [5019]  # the end of the bucket that holds step 5000
    assert len(downsample(list(range(10_000)), [math.nan, 1.0] * 5_000, 1000)) <= 1500


def test_smoothing_leaves_a_constant_alone_and_skips_gaps() -> None:
    out = smooth([2.0, 2.0, math.nan, None, 2.0], 6)
    assert out[2] is None
    assert out[3] is None
    assert [out[i] for i in (0, 1, 4)] == pytest.approx([2.0] * 3, rel=1e-12)


def test_smoothing_does_not_lag() -> None:
    """Far from its ends a straight line comes back as it went in; a one-way average would run (span - 1) / 2 behind."""
    ramp = [float(i) for i in range(400)]
    # What the ends add decays by (1 - 2/(span + 1)) a point: (5/7)^200 is below 1e-29.
    assert smooth(ramp, 6)[200] == pytest.approx(200.0, abs=1e-9)


def test_smoothing_quietens_noise() -> None:
    dice = random.Random(2)
    out = smooth([dice.gauss(0, 1) for _ in range(2000)], 20)
    spread = math.sqrt(sum(y * y for y in out if y is not None) / 2000)
    # White noise through an exponential average and back: variance a(1 + k^2)/(1 + k)^3, k = 19/21, a = 1 - k.
    k = 19 / 21
    expected = math.sqrt((1 - k) * (1 + k * k) / (1 + k) ** 3)
    assert spread == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 3.2, [0, 1, 2, 3, 4]), (0, 2e-3, [0, 5e-4, 1e-3, 1.5e-3, 2e-3]), (-1.1, 2.6, [-2, -1, 0, 1, 2, 3])],
)
def test_ticks_are_round_and_hold_the_data(low: float, high: float, ticks: list[float]) -> None:
    axis = linear_axis(low, high)
    assert list(axis.ticks) == pytest.approx(ticks)
    assert axis.low <= low < high <= axis.high


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-12, 1e12])
def test_a_single_value_has_an_axis(value: float) -> None:
    axis = linear_axis(value, value)
    assert axis.low <= value <= axis.high
    assert axis.low < axis.high
    assert len(axis.ticks) >= 2


def test_a_tight_axis_ends_at_the_data() -> None:
    axis = linear_axis(1, 120, about=5, whole=True, tight=True)
    assert (axis.low, axis.high) == (1, 120)
    assert list(axis.ticks) == [25, 50, 75, 100]
    assert (axis.place(1), axis.place(120)) == (0, 1)


@pytest.mark.parametrize(("low", "high"), [(0.02, 3.0), (0.011, 0.012), (1e-9, 1e12), (1.0, 1.0), (2.0, 900.0)])
def test_a_logarithmic_axis_holds_the_data(low: float, high: float) -> None:
    axis = log_axis(low, high)
    assert axis.low <= low * (1 + 1e-9)
    assert high <= axis.high * (1 + 1e-9)
    assert 2 <= len(axis.ticks) <= 8
    assert 0 - 1e-9 <= axis.place(low) <= axis.place(high) <= 1 + 1e-9
