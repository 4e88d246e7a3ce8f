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
