"""Numbers in words."""

from __future__ import annotations

import math

import pytest

from ft_core.report import numbers
from ft_core.report.metrics import Metric
from ft_core.report.numbers import DASH, MINUS, SPACE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.1007, "3.101"),
        (0.0204, "0.0204"),
        (0.00020, "0.0002"),
        (2e-5, "2e-5"),
        (-1.5, "-1.5"),
        (9.99996, "10"),
        (1234567.0, "1,234,567"),
        (1e300, "1e300"),
        (math.nan, "not a number"),
        (-math.inf, "-∞"),
    ],
)
def test_plain(value: float, text: str) -> None:
    assert numbers.plain(value) == text.replace("-", MINUS)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        ("percent", 0.98, "98 %"),
        ("percent", 0.035, "3.5 %"),
        ("percent", 0.9999, "> 99.9 %"),
        ("percent", 0.0001, "< 0.1 %"),
        ("percent", 1, "100 %"),
        ("memory", 900, "900 B"),
        ("memory", 2800000000, "2.61 GiB"),
        ("memory", 900000000, "858 MiB"),
        ("duration", 0.84, "0.8 s"),
        ("duration", 59.6, "1 min 00 s"),
        ("duration", 251.3, "4 min 11 s"),
        ("duration", 9700.4, "2 h 42 min"),
        ("duration", 4 * 86400, "4 d 0 h"),
        ("count", 74880, "74,880"),
        ("compact", 134515008, "134.5 M"),
        ("compact", 8030261248, "8.03 B"),
        ("compact", 9999, "9,999"),
    ],
)
def test_units(function: str, value: float, text: str) -> None:
    assert getattr(numbers, function)(value).replace(SPACE, " ") == text


def test_dates() -> None:
    assert numbers.date("2026-11-23T20:00:00+01:00").replace(SPACE, " ") == "23 November 2026, 19:00 UTC"
    assert numbers.date("soon") == "soon"


@pytest.mark.parametrize(
    ("metric", "better", "change"),
    [
        (Metric("exact_match", 0.03, 0.98), True, "+95 points"),
        (Metric("loss", 3.1, 0.02), True, "-99.4 %"),
        (Metric("loss", 0.5, 0.75), False, "+50 %"),
        (Metric("wer", 0.1, 0.2), False, "+10 points"),
        (Metric("tone", 1.0, 2.0), None, "+100 %"),
        (Metric("loss", 0.5, 0.5), None, "none"),
        (Metric("loss", None, 0.5), None, DASH),
        (Metric("loss", math.nan, 0.5), None, DASH),
        (Metric("perplexity", math.inf, 2.0), True, DASH),
        (Metric("reward", 0.0, 1.5), True, "+1.5"),
        (Metric("perplexity", 1.2e9, 1.2), True, "\N{DIVISION SIGN} 1e9"),
        (Metric("perplexity", 1.5, 6e4), False, "\N{MULTIPLICATION SIGN} 40,000"),
    ],
)
def test_which_way_is_better(metric: Metric, better: bool | None, change: str) -> None:
    assert metric.better is better
    assert metric.change.replace(SPACE, " ") == change.replace("-", MINUS)
