"""The arithmetic of the overlap benchmark: which part of the copies runs beside a kernel of another stream."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
overlap = pytest.importorskip("overlap")


def _event(kind: str, name: str, stream: int, begin: float, end: float, **more: Any) -> dict[str, Any]:
    args = {"stream": stream, **more}
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": end - begin, "args": args}


def test_intervals_are_joined_in_order() -> None:
    assert overlap.union([]) == []
    assert overlap.union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert overlap.union([(0, 10), (1, 2)]) == [(0, 10)]


def test_an_overlap_is_what_counting_gives() -> None:
    draw = random.Random(0)
    for _ in range(200):
        starts = [draw.randrange(60) for _ in range(draw.randrange(8))]
        others = [(a, a + draw.randrange(1, 10)) for a in starts]
        begin = draw.randrange(60)
        one = begin, begin + draw.randrange(1, 20)
        counted = sum(any(a <= t < b for a, b in others) for t in range(*one))
        assert overlap.overlap(one, overlap.union(others)) == counted


def test_only_kernels_of_other_streams_count() -> None:
    events = [
        _event("kernel", "product", 7, 0, 100),
        _event("kernel", "on the copies' own stream", 20, 100, 200),
        _event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 20, 50, 150, bytes=200_000),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 0, 50, bytes=100_000),
        _event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 150, 160),
        _event("gpu_memset", "Memset (Device)", 7, 150, 160),
        {"ph": "i", "ts": 5, "name": "no interval"},
        _event("cpu_op", "aten::mm", 1, 0, 300),
    ]
    found = overlap.measure(events)
    assert found["copies"] == 2
    assert found["copy_ms"] == pytest.approx(0.15)
    assert found["share"] == pytest.approx(100 / 150, abs=1e-4)
    assert found["directions"]["to host"]["gb_s"] == pytest.approx(2.0)
    assert found["span_ms"] == pytest.approx(0.2)
    assert found["idle_ms"] == pytest.approx(0.0)


def test_a_trace_without_copies_has_no_share(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": [_event("kernel", "product", 7, 0, 10)]}))
    found = overlap.measure(overlap.events_of(file))
    assert found["copies"] == 0
    assert "no copies" in overlap.line({"way": "offload", **found})
