"""The reward `reasoning-gym`, by the real verifiers."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from ft_core.errors import ConfigError, RunError
from ft_rl.rewards import resolve_rewards
from ft_rl.rewards.gym import verified

gym = pytest.importorskip("reasoning_gym", reason='reasoning-gym is not installed: pip install "ft-rl[gym]"')
pytestmark = pytest.mark.usefixtures("isolation")


def rows(name: str, count: int, **settings: Any) -> list[dict[str, Any]]:
    return list(gym.create_dataset(name, size=count, seed=7, **settings))


def columns(made: list[dict[str, Any]], *, text: bool = False) -> dict[str, list[Any]]:
    metadata = [json.dumps(row["metadata"], default=str) if text else row["metadata"] for row in made]
    return {"answer": [row["answer"] for row in made], "metadata": metadata}


def test_several_data_sets_in_one_batch() -> None:
    made = [*rows("basic_arithmetic", 2), *rows("spell_backward", 2), *rows("countdown", 1)]
    right = [f"<answer>{row['answer']}</answer>" for row in made]
    wrong = ["<answer>nonsense</answer>"] * 4
    (reward,) = resolve_rewards(["reasoning-gym"]).functions
    prompts = [row["question"] for row in made]
    assert reward(prompts=prompts, completions=right, **columns(made, text=True)) == [1.0] * 5
    values = reward(prompts=prompts[:4], completions=wrong, **columns(made[:4]))
    for row, value in zip(made, values, strict=False):
        theirs = gym.get_score_answer_fn(row["metadata"]["source_dataset"])("nonsense", row)
        assert value == theirs < 0.5
    assert reward(prompts=prompts[:1], completions=["3"], **columns(made[:1])) == [0.0]  # no tag, no answer
    assert reward.columns == ("answer", "metadata")


def test_a_share_of_an_answer_is_theirs() -> None:
    (row,) = rows("basic_arithmetic", 1)
    theirs = gym.get_score_answer_fn("basic_arithmetic")(f"it is {row['answer']}", row)
    assert 0 < theirs < 1
    (reward,) = resolve_rewards([{"name": "reasoning-gym", "part": "whole", "dataset": "basic_arithmetic"}]).functions
    row["metadata"] = {}
    assert reward(prompts=["p"], completions=[f"it is {row['answer']}"], **columns([row])) == [theirs]


def test_an_answer_that_is_a_program_harms_nothing(tmp_path: Any) -> None:
    """Some verifiers evaluate the answer: it does run, and finds nothing there to write to."""
    (row,) = rows("countdown", 1)
    answer = f"__import__('os').system('touch {tmp_path}/here') + 1"
    assert gym.get_score_answer_fn("countdown")(answer, row) < 0.5
    assert os.listdir(tmp_path) == ["here"]  # theirs alone does harm
    os.remove(tmp_path / "here")
    (reward,) = resolve_rewards(["reasoning-gym"]).functions
    (value,) = reward(prompts=["p"], completions=[f"<answer>{answer}</answer>"], **columns([row]))
    assert value is not None
    assert value < 0.5
    assert os.listdir(tmp_path) == []


def test_one_that_hangs_or_crashes_gets_nothing_and_the_others_their_due() -> None:
    (row,) = rows("countdown", 1)
    right = ("countdown", row["metadata"]["expression"], row)
    hangs = ("countdown", "9**9**9**9", row)
    crashes = ("countdown", "__import__('os').abort()", row)
    leaves = ("countdown", "__import__('os')._exit(0)", row)
    start = time.monotonic()
    assert verified([right, hangs, crashes, leaves, right], 4.0) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < 60


def test_unknown_data_sets() -> None:
    (row,) = rows("basic_arithmetic", 1)
    (reward,) = resolve_rewards([{"name": "reasoning-gym", "dataset": "basic_arithmetics"}]).functions
    with pytest.raises(ConfigError, match="reasoning-gym has no data set 'basic_arithmetics'"):
        reward(prompts=["p"], completions=["<answer>1</answer>"], **columns([row]))
    (reward,) = resolve_rewards(["reasoning-gym"]).functions
    for metadata, said in (
        ({"source_dataset": "none"}, "no data set 'none'"),
        ({}, "name no source_dataset"),
        ("{", "name no"),
    ):
        with pytest.raises(RunError, match=said):
            reward(prompts=["p"], completions=["<answer>1</answer>"], answer=["1"], metadata=[metadata])
