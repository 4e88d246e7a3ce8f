"""Samples of rollouts: which are chosen, how they are written, how many of a long run."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ft_core.errors import RunError
from ft_rl.recording import shares
from ft_rl.samples_log import SamplesLog, best_and_worst, readable


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.parametrize(
    ("totals", "chosen"),
    [
        ([0.5, 2.0, -1.0, 0.0], [("best", 1), ("worst", 2)]),
        ([1.0, 1.0, 1.0], [("best", 0), ("worst", 2)]),  # equal ones: two that differ, where there are two
        ([None, 3.0, math.nan, 1.0, math.inf], [("best", 1), ("worst", 3)]),
        ([None, 3.0], [("best", 1)]),
        ([None, math.nan], []),
        ([], []),
    ],
)
def test_the_best_and_the_worst(totals: list[float | None], chosen: list[tuple[str, int]]) -> None:
    assert best_and_worst(totals) == chosen


def test_a_line_holds_what_a_person_wants_to_read(tmp_path: Path) -> None:
    log = SamplesLog(tmp_path, total=10)
    prompts = ["2+2?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\u2028\ud800?"}]]
    completions = ["5", [{"role": "assistant", "content": "4"}]]
    log.write(3, prompts, completions, {"right": [0.0, 1.0], "short": [math.nan, 0.5]}, [0.0, 1.5])
    best = {"step": 3, "rank": "best", "reward": 1.5, "rewards": {"right": 1.0, "short": 0.5}}
    worst = {"step": 3, "rank": "worst", "reward": 0.0, "rewards": {"right": 0.0, "short": None}}
    assert rows(tmp_path) == [
        best | {"prompt": "system: Be brief.\nuser: \u2028\ud800?", "completion": "4"},
        worst | {"prompt": "2+2?", "completion": "5"},
    ]


def test_a_long_run_is_recorded_now_and_then(tmp_path: Path) -> None:
    log = SamplesLog(tmp_path, total=100_000)
    for step in range(1, 100_001, 4):  # a rollout is used for four steps
        log.write(step, ["p", "p"], ["a", "b"], {"r": [0.0, 1.0]}, [0.0, 1.0])
    steps = sorted({row["step"] for row in rows(tmp_path)})
    assert 400 <= len(steps) <= 500
    assert steps[0] == 1
    assert steps[-1] > 99_500
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 204


def test_messages_become_text() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert readable([{"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}]) == "2 and 2\n4"
    assert readable([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]) == (
        "[image]\nWhat?"
    )
    said = readable([{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}])
    assert said == f"assistant: {json.dumps([call])}\ntool: 3"
    assert readable([]) == ""


def test_of_a_long_text_the_ends_are_kept() -> None:
    said = readable("a" * 50_000 + "the answer is 7")
    assert said.startswith("a" * 10_000 + "\n…")
    assert said.endswith("the answer is 7")
    assert "30,015 characters left out" in said
    assert len(said) < 20_100
    assert readable("b" * 20_000) == "b" * 20_000


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    log = SamplesLog(tmp_path / "none", total=1)
    with pytest.raises(RunError, match=r"cannot write .*none/samples\.jsonl: No such file.*--resume"):
        log.write(1, ["p"], ["c"], {"r": [1.0]}, [1.0])


def test_shares_add_up_to_the_mean_total() -> None:
    nan = math.nan
    rewards = torch.tensor([[1.0, 2.0], [nan, 4.0], [nan, nan], [0.5, nan]])
    # Three completions are scored: (1 × 2 + 0.5 × 2) / 3 and (2 × −1 + 4 × −1) / 3.
    assert shares(rewards, torch.tensor([2.0, -1.0])).tolist() == pytest.approx([1.0, -2.0])
