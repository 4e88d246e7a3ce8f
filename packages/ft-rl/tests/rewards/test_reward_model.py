"""The reward `reward-model`: a run of `method: reward`, and a transformers folder, score prompts with completions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from ft_core.errors import ConfigError, DataError, FtError, RunError
from ft_core.training import train
from ft_rl.rewards import resolve_rewards

SAY: Any = lambda line: None  # noqa: E731


def reward_of(model: Path, **settings: Any) -> Any:
    (reward,) = resolve_rewards([{"name": "reward-model", "model": str(model), **settings}], say=SAY).functions
    return reward


@pytest.fixture(scope="module")
def run(toy: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of reward modelling on a preference for kind words."""
    folder = tmp_path_factory.mktemp("judge")
    toy.write_rows(folder / "pairs.jsonl", toy.rows(256, seed=1))
    values = {
        "model": str(tiny_model),
        "method": "reward",
        "data": str(folder / "pairs.jsonl"),
        "max_length": 32,
        "lora": {"r": 8},
        "training": {"max_steps": 30, "batch_size": 16, "gradient_accumulation": 1, "learning_rate": 1e-2},
        "output": str(folder / "run"),
    }
    return train(values, say=SAY).run


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with one score, its weights random, and such as 16 bits hold."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("judge") / "classifier"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.bfloat16().float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def exactly(reward: Any) -> Any:
    """The reward in float32, whatever 16 bits this machine computes in."""
    reward.function.model.float()
    return reward


def alone(folder: Path, tokenizer: Any, sequences: list[list[int]]) -> list[float]:
    """Each sequence scored alone, without padding."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id
    ).eval()
    with torch.inference_mode():
        return [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]


def test_a_trained_run_prefers_what_it_was_taught(toy: Any, run: Path) -> None:
    reward = reward_of(run)
    rows = toy.rows(64, seed=2)
    prompts = [row["prompt"] for row in rows]
    chosen = reward(prompts=prompts, completions=[row["chosen"] for row in rows])
    rejected = reward(prompts=prompts, completions=[row["rejected"] for row in rows])
    assert sum(c > r for c, r in zip(chosen, rejected, strict=True)) >= 60


def test_a_batch_scores_as_its_sequences_do_alone(toy: Any, folder: Path, tokenizer: Any) -> None:
    rows = toy.rows(40, seed=5)
    prompts, completions = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    ids = [tokenizer(row["prompt"] + row["chosen"] + "<eos>").input_ids for row in rows]
    expected = alone(folder, tokenizer, ids)
    assert len({len(sequence) for sequence in ids}) > 3
    for most in (16, 64, 100_000):  # a sequence at a time, a few, all
        reward = exactly(reward_of(folder, batch_tokens=most))
        values = reward(prompts=prompts, completions=completions)
        # Scores of about 3, through a few hundred float32 operations of another order each.
        assert values == pytest.approx(expected, abs=3 * 300 * 2**-24)


def test_messages_go_through_its_own_template(folder: Path, tokenizer: Any) -> None:
    prompt, completion = [{"role": "user", "content": "tell me"}], [{"role": "assistant", "content": "sure"}]
    ids = tokenizer("<user> tell me <eos> <assistant> sure <eos> ").input_ids
    (value,) = exactly(reward_of(folder))(prompts=[prompt], completions=[completion])
    assert value == pytest.approx(alone(folder, tokenizer, [ids])[0], abs=3 * 300 * 2**-24)
    with pytest.raises(
        DataError, match="reward 'reward-model': prompt and completion are both strings or both messages"
    ):
        reward_of(folder)(prompts=["tell me"], completions=[completion])


def test_one_that_is_too_long_is_a_fault_of_its_sample(folder: Path) -> None:
    completions = ["sure", "please " * 80]
    with pytest.raises(RunError, match=r"sample 2 of 2 .*: 83 tokens, and the reward model takes 64"):
        reward_of(folder)(prompts=["tell me "] * 2, completions=completions)
    values = reward_of(folder, on_error="skip", max_length=4)(prompts=["tell me "] * 2, completions=completions)
    assert values[0] is not None
    assert values[1] is None


def test_it_disturbs_no_random_number_and_no_gradient(run: Path, folder: Path) -> None:
    for model in (run, folder):
        random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
        expected = (random.random(), numpy.random.rand(), torch.rand(1))
        random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
        reward = reward_of(model)
        assert (random.random(), numpy.random.rand(), torch.rand(1)) == expected
        assert not any(parameter.requires_grad for parameter in reward.function.model.parameters())
        assert not reward.function.model.training


def test_what_is_no_reward_model(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(FtError, match=r"no run or model folder .*nowhere"):
        reward_of(tmp_path / "nowhere")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2, dtype=torch.float32)
    model.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(
        ConfigError, match=r"^rewards\.0 \(reward-model\): .*two gives 2 scores a sequence: a reward model"
    ):
        reward_of(tmp_path / "two")
    with pytest.raises(
        FtError, match=r"^rewards\.0 \(reward-model\): .* is no reward model: it lacks score\.weight, such"
    ):
        reward_of(tiny_model)
