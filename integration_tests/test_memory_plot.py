"""The figure of memory against length: the newest rows of each contestant, as well-formed SVG."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
plot_memory = pytest.importorskip("plot_memory")


def _row(contestant: str, tokens: int, gib: float | None, way: str = "") -> dict[str, Any]:
    row = {
        "mode": "lengths", "contestant": contestant, "tokens": tokens, "rank": 16, "gpu": "a GPU",
        "date": "2026-12-01T",
    }  # fmt: skip
    row |= {"way": way} if contestant == "ft" else {}
    return row | ({"error": "OutOfMemoryError: ", "out_of_memory": True} if gib is None else {"peak_gib": gib})


ROWS = [
    _row("transformers", 2048, 9.0),
    _row("transformers", 4096, None),
    _row("ft", 2048, 7.0, "offload-input/4096"),
    _row("ft", 2048, 6.0, "offload-input/4096"),
    _row("ft", 2048, 60.0, "auto"),
    _row("ft", 4096, 6.5, "offload-input/4096"),
    {"mode": "caps", "contestant": "ft", "tokens": 9999},
]


def test_the_newest_row_of_each_length_is_drawn() -> None:
    found = plot_memory.series(ROWS, "offload-input/4096")
    assert found == {"ft": {2048: 6.0, 4096: 6.5}, "transformers + PEFT": {2048: 9.0, 4096: None}}
    assert list(found) == ["ft", "transformers + PEFT"]


def test_the_figure_is_whole_and_says_what_it_shows() -> None:
    text = plot_memory.drawn(plot_memory.series(ROWS, "offload-input/4096"), plot_memory.about(ROWS))
    root = ElementTree.fromstring(text)
    said = "".join(root.itertext())
    assert "out of memory at 4,096" in said
    assert "a GPU, 2026-12-01" in said
    assert len([one for one in root.iter() if one.tag.endswith("circle")]) == 3
