"""What the convergence benchmark compares: the same order of rows for a seed, and losses that are near or far."""

import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
convergence = pytest.importorskip("convergence")


def test_the_order_is_the_seed_s_and_leaves_no_row_out() -> None:
    first = list(islice(convergence.order(10, 4, 0), 5))
    assert first == list(islice(convergence.order(10, 4, 0), 5)) != list(islice(convergence.order(10, 4, 1), 5))
    numbers = [number for batch in first for number in batch]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))


def test_differences_of_smoothed_losses() -> None:
    def run(way: str, seed: int, shift: float) -> dict[str, object]:
        return {"way": way, "seed": seed, "losses": [3.0 + shift, 2.0 + shift], "after": 1.0 + shift}

    rows = [run("plain", 0, 0.0), run("fast", 0, 0.25), run("plain", 1, 0.5), run("nudged", 1, 0.5)]
    found = convergence.comparison([*rows, {"way": "again", "seed": 0, "error": "out of memory"}])
    assert convergence.smoothed([3.0, 2.0]) == [3.0, 2.5]
    assert found["fast and plain, same seed"] == [0.25]
    assert found["nudged and plain, same seed"] == [0.0]
    assert found["again and plain, same seed"] == []
    assert found["plain, two seeds"] == [0.5]
    assert found["fast and plain, held out after"] == [0.25]


def test_the_text_is_real_and_long_enough() -> None:
    texts = list(convergence.documents())
    assert sum(map(len, texts)) > 1_000_000
    assert any("generator" in text for text in texts)
