"""The benchmarks of the planner and of memory: configurations follow from a seed, and a failed case is a row."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
planner_check = pytest.importorskip("planner_check")
auto_memory = pytest.importorskip("auto_memory")
cases = pytest.importorskip("cases")


def test_configurations_are_drawn_by_the_seed_alone() -> None:
    drawn = planner_check.draw(0, 12)
    assert drawn == planner_check.draw(0, 12) != planner_check.draw(1, 12)
    assert drawn[:5] == planner_check.draw(0, 5)
    assert {one.family for one in drawn} == {"llama", "qwen2", "qwen3"}
    assert {one.quantization for one in drawn} == {"none", "nf4", "int8"}
    assert all(512 <= one.rows * one.length <= 16384 for one in drawn)
    assert sum(one.memory is not None for one in drawn) == 6


@pytest.mark.parametrize("number", [0, 1, 4])
def test_what_is_drawn_can_be_planned(number: int, tmp_path: Path) -> None:
    drawn = planner_check.draw(0, 5)[number]
    planner_check.outline(drawn, tmp_path)
    config, planned = planner_check.settle(drawn, tmp_path)
    assert planned.fits
    assert (config.memory == "auto") == (drawn.bound is None)
    assert planned.peak.exact
    assert "predicted" in planner_check.line({"number": 0, **vars(drawn), **planner_check.predicted(planned)})


def test_a_configuration_is_trained_beside_its_plan(tmp_path: Path) -> None:
    """By ft train's own parts, of which one may have changed."""
    args = argparse.Namespace(device="cpu", steps=1)
    row = planner_check.check(planner_check.draw(0, 2, tiny=True)[1], tmp_path, args)
    assert row["timed"] == 1
    assert row["step_s"] > 0
    assert row["predicted_s"] > 0


def test_the_worst_ratio_of_auto_is_that_to_the_best_policy_within_the_bound() -> None:
    def row(policy: str, seconds: float, peak: float, bound: float = 8.0) -> dict[str, Any]:
        return {
            "policy": policy, "quantization": "nf4", "memory_gib": bound, "tokens": 512, "step_s": seconds,
            "peak_gib": peak,
        }  # fmt: skip

    rows = [row("keep", 0.5, 9.0), row("recompute", 1.0, 7.0), row("offload", 1.2, 6.0), row("auto", 1.1, 7.5)]
    failed = {"policy": "inputs", "quantization": "nf4", "memory_gib": 8.0, "tokens": 512, "error": "out of memory"}
    lines = auto_memory.summary([*rows, failed])
    assert lines[-1].startswith("the worst: 1.100")
    assert "recompute" in lines[0]
    free = [row("keep", 0.5, 9.0, 0.0), row("auto", 0.51, 9.0, 0.0)]
    assert auto_memory.summary(free)[-1].startswith("the worst: 1.020")
    assert auto_memory.summary(rows[:3]) == []


def test_a_failed_case_is_a_row_and_says_whether_memory_was_short() -> None:
    import torch

    def full() -> dict[str, Any]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        except torch.OutOfMemoryError as error:
            raise ValueError("a case failed") from error

    assert cases.attempt(full) == {"error": "ValueError: a case failed", "out_of_memory": True}
    assert cases.attempt(lambda: {}["missing"])["out_of_memory"] is False
    assert cases.attempt(lambda: {"a": 1}) == {"a": 1}


def test_what_would_end_too_late_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    limit = cases.Limit.of(100)
    assert limit.allows("a short case", 50)
    assert not limit.allows("a long case", 150)
    assert "a long case: left out" in capsys.readouterr().out
    assert cases.Limit.of(None).allows("any", 1e9)
    assert not cases.Limit(time.time() - 1).allows("a late case", 1)
