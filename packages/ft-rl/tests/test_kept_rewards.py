"""What a job scores with is made once: for the training and what is measured before and after, and for `ft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ft_core.evaluation import evaluate
from ft_core.training import train
from ft_rl.rewards import reward_model

COUNTED = """
import pathlib
with (pathlib.Path(__file__).parent / "runs.txt").open("a") as file:
    file.write("run\\n")

def one(prompts, completions, **columns):
    return [1.0] * len(completions)
"""


def test_a_reward_model_is_loaded_once_a_job(
    toy: Any, tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "mine.py").write_text(COUNTED)
    loaded: list[str] = []
    load = reward_model._load

    def counted(reference: str) -> Any:
        loaded.append(reference)
        return load(reference)

    monkeypatch.setattr(reward_model, "_load", counted)
    prompts = [{"prompt": row["prompt"].strip()} for row in toy.rows(16, seed=1)]
    values = {
        "model": str(tiny_model),
        "method": "grpo",
        "data": str(toy.write_rows(tmp_path / "prompts.jsonl", prompts[:12])),
        "eval_data": str(toy.write_rows(tmp_path / "held_out.jsonl", prompts[12:])),
        "rewards": [
            {"name": "reward-model", "model": str(tmp_path / "judge")},
            {"name": f"{tmp_path / 'mine.py'}:one"},
        ],
        "max_length": 32,
        "lora": {"r": 4},
        "training": {"max_steps": 1, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3},
        "output": str(tmp_path / "run"),
        "grpo": {"max_completion_length": 4, "num_generations": 2},
    }
    result = train(values, say=lambda line: None)
    measured = result.evaluation
    assert measured is not None
    assert all(measured["metrics"]["reward-model"][side] is not None for side in ("before", "after"))
    assert loaded == [str(tmp_path / "judge")]
    assert (tmp_path / "runs.txt").read_text() == "run\n"
    again = evaluate(result.run, say=lambda line: None)
    assert len(loaded) == 2
    for side in ("before", "after"):
        assert again["metrics"]["reward"][side] == pytest.approx(measured["metrics"]["reward"][side], abs=1e-6)


SHARED = (
    COUNTED
    + """
MOVES = []

class World:
    def reset(self, **row):
        MOVES.clear()

    def step(self, completion):
        MOVES.append(completion)
        return None, 0.0, True

def moves(prompts, completions, **columns):
    return [float(len(MOVES))] * len(completions)

def is_world(prompts, completions, environments, **columns):
    return [float(isinstance(one, World)) for one in environments]
"""
)


def test_an_environment_and_a_reward_of_one_file_share_what_it_holds(tiny_model: Path, tmp_path: Path) -> None:
    from ft_core.config.load import check_config, method_settings
    from ft_core.evaluation import EvaluationJob
    from ft_rl.grpo import WritingSettings, scored_by

    file = tmp_path / "mine.py"
    file.write_text(SHARED)
    config = check_config({
        "model": str(tiny_model),
        "method": "grpo",
        "data": "prompts.jsonl",
        "rewards": [f"{file}:moves", f"{file}:is_world"],
        "grpo": {"environment": f"{file}:World"},
    })  # fmt: skip
    settings = method_settings(config)
    assert isinstance(settings, WritingSettings)
    nobody: Any = None
    job = EvaluationJob(config, settings, nobody, nobody, [])
    world, rewards = scored_by(job, settings)
    assert world is not None
    player = world.make()
    player.reset()
    player.step("a")
    player.step("b")
    each, _ = rewards.score(["p"], ["c"], environments=[player])
    assert each == [[2.0], [1.0]]
    assert scored_by(job, settings) == (world, rewards)
    assert (tmp_path / "runs.txt").read_text() == "run\n"
