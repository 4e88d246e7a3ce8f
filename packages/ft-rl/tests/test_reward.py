"""The method as a person uses it: through ft_core's train and evaluate, on a tiny model and a real preference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ft_core.config import TrainConfig
from ft_core.config.load import check_config
from ft_core.errors import ConfigError, DataError
from ft_core.evaluation import EvaluationJob, evaluate
from ft_core.plugins import MethodSpec, registry, resolve
from ft_core.training import train
from ft_rl.reward import RewardSettings
from ft_rl.reward import evaluate as evaluate_reward


def config(toy: Any, tiny_model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    toy.write_rows(folder / "pairs.jsonl", toy.rows(256, seed=1))
    toy.write_rows(folder / "held_out.jsonl", toy.rows(64, seed=2))
    training = {"max_steps": 30, "batch_size": 16, "gradient_accumulation": 1, "learning_rate": 1e-2}
    values = {
        "model": str(tiny_model),
        "method": "reward",
        "data": str(folder / "pairs.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "max_length": 32,
        "lora": {"r": 8},
        "output": str(folder / "run"),
    }
    return values | changes | {"training": training | changes.get("training", {})}


@pytest.fixture(scope="module")
def run(toy: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    result = train(config(toy, tiny_model, folder, reward={"center_rewards_coefficient": 0.01}), say=lambda line: None)
    assert result.status == "finished"
    return result.run


def test_it_learns_the_preference(run: Path) -> None:
    measured = json.loads((run / "evaluation.json").read_text())
    accuracy, margin, loss = (measured["metrics"][name] for name in ("accuracy", "margin", "loss"))
    # Untrained, 64 fair coins: over 0.8 has a chance of 1e-6.
    assert accuracy["before"] < 0.8
    assert accuracy["after"] >= 0.95
    assert margin["after"] > 1 > abs(margin["before"])
    assert loss["after"] < 0.3 < loss["before"]
    assert measured["rows"] == 64


def test_the_steps_are_recorded(run: Path) -> None:
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in steps if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 31))
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "loss"):
        assert all(isinstance(row[name], float) for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] / 2
    assert json.loads((run / "summary.json").read_text())["data"]["train_rows"] == 256


def test_the_adapter_of_a_quantized_model_is_float32(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    values = config(toy, tiny_model, tmp_path, quantization="nf4", training={"max_steps": 2})
    train(values, say=lambda line: None)
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if "lora_" in name} == {torch.float32}


def test_the_samples_show_both_scores(toy: Any, run: Path) -> None:
    sample = json.loads((run / "evaluation.json").read_text())["samples"][0]
    row = toy.rows(64, seed=2)[0]
    assert sample["prompt"] == row["prompt"]
    assert sample["expected"] == row["chosen"]
    for side in ("before", "after"):
        words = sample[side].replace(",", "").split()
        assert words[0::2] == ["chosen", "rejected"]
        assert all(word[0] in "+-" for word in words[1::2])


def test_the_adapter_is_standard_and_holds_the_head(toy: Any, run: Path, tiny_model: Path, tokenizer: Any) -> None:
    """Plain PEFT and transformers load it, and rank as the report says."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    assert any("score" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    wins = 0
    for row in toy.rows(64, seed=2):
        scores = []
        for name in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[name] + "<eos>", return_tensors="pt").input_ids
            with torch.inference_mode():
                scores.append(float(model(input_ids=ids).logits))
        wins += scores[0] > scores[1]
    reported = json.loads((run / "evaluation.json").read_text())["metrics"]["accuracy"]["after"]
    assert wins / 64 == pytest.approx(reported, abs=1.5 / 64)  # bfloat16 may decide a close pair otherwise


def test_ft_eval_measures_the_same_again(run: Path) -> None:
    reported = json.loads((run / "evaluation.json").read_text())["metrics"]["accuracy"]["after"]
    again = evaluate(run, say=lambda line: None)
    assert again["metrics"]["accuracy"]["after"] == pytest.approx(reported, abs=1.5 / 64)


def test_full_training_on_messages(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    toy.write_rows(tmp_path / "messages.jsonl", toy.rows(256, seed=3, messages=True))
    values = config(toy, tiny_model, tmp_path, lora=None, training={"learning_rate": 3e-3})
    values |= {"data": str(tmp_path / "messages.jsonl"), "eval_data": None, "eval_split": 64}
    result = train(values, say=lambda line: None)
    assert result.evaluation is not None
    assert result.evaluation["metrics"]["accuracy"]["after"] >= 0.95
    assert (result.run / "model" / "model.safetensors").is_file()


def job(tiny_model: Path, tokenizer: Any, made: list[dict[str, Any]], max_length: int = 64) -> EvaluationJob:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32).eval()
    settings = TrainConfig(model=str(tiny_model), method="reward", data="pairs.jsonl", max_length=max_length)
    return EvaluationJob(settings, RewardSettings(), model, tokenizer, made)


def test_batched_scores_are_those_of_single_sequences(toy: Any, tiny_model: Path, tokenizer: Any) -> None:
    """Padding changes nothing, and every score belongs to its own pair."""
    made = toy.rows(200, seed=4)  # several batches
    work = job(tiny_model, tokenizer, made)
    measured = evaluate_reward(work)
    differences = []
    for row in made:
        chosen, rejected = (tokenizer(row["prompt"] + row[n] + "<eos>").input_ids for n in ("chosen", "rejected"))
        with torch.inference_mode():
            scores = [float(work.model(input_ids=torch.tensor([ids])).logits) for ids in (chosen, rejected)]
        differences.append(scores[0] - scores[1])
    assert measured.rows == 200
    assert measured.metrics["margin"] == pytest.approx(sum(differences) / 200, abs=1e-5)
    assert measured.metrics["accuracy"] == sum(d > 0 for d in differences) / 200
    expected = -torch.nn.functional.logsigmoid(torch.tensor(differences, dtype=torch.float64)).mean()
    assert measured.metrics["loss"] == pytest.approx(float(expected), abs=1e-5)
    chosen, rejected = (float(word) for word in measured.samples[5].answer.replace(",", "").split()[1::2])
    assert chosen - rejected == pytest.approx(differences[5], abs=1.1e-3)  # shown to three places


def test_samples_can_be_told_apart(tiny_model: Path, tokenizer: Any) -> None:
    made = [{"chosen": "sure", "rejected": "no"}] * 2 + [{"prompt": "tell me ", "chosen": "sure", "rejected": "no"}] * 2
    measured = evaluate_reward(job(tiny_model, tokenizer, made))
    assert [s.prompt for s in measured.samples] == ["(pair 1)", "(pair 2)", "tell me ", "tell me  (pair 4)"]


def test_long_pairs_are_said(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    made = toy.rows(40, seed=5)
    made[3]["chosen"] = "please " * 40
    values = config(toy, tiny_model, tmp_path, training={"max_steps": 1}, eval_data=None)
    toy.write_rows(tmp_path / "pairs.jsonl", made)
    result = train(values, say=lines.append)
    assert "1 of 40 train pairs is longer than max_length 32: left out" in lines
    assert json.loads((result.run / "summary.json").read_text())["data"]["overlong_rows"] == 1


def test_nothing_short_enough(toy: Any, tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 256 train pairs are longer than max_length 4: raise max_length"):
        train(config(toy, tiny_model, tmp_path, max_length=4), say=lambda line: None)
    with pytest.raises(DataError, match="all 2 held-out pairs are longer than max_length 4"):
        evaluate_reward(job(tiny_model, tokenizer, toy.rows(2, 0), max_length=4))


def test_rows_of_another_format(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    values = config(toy, tiny_model, tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="preference"):
        train(values, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_before_anything_loads(toy: Any, tiny_model: Path, tmp_path: Path) -> None:
    for section, words in (
        ({"center_reward_coefficient": 0.1}, "center_rewards_coefficient"),
        ({"center_rewards_coefficient": -1}, "center_rewards_coefficient"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_config(config(toy, tiny_model, tmp_path, reward=section))


def test_the_settings_are_trls() -> None:
    """Every setting is a field of TRL's RewardConfig, and the defaults agree."""
    from dataclasses import fields

    from trl import RewardConfig

    theirs = {field.name: field.default for field in fields(RewardConfig)}
    ours = RewardSettings().model_dump()
    assert set(ours) <= set(theirs)
    assert ours | {"pad_to_multiple_of": "auto"} == {name: theirs[name] for name in ours}  # "auto" is None off Neuron


def test_the_method_is_registered() -> None:
    spec = registry().get(MethodSpec, "reward")
    assert (spec.head, spec.formats) == ("score", ("preference",))
    assert all(callable(resolve(reference)) for reference in (spec.settings, spec.trainer, spec.evaluate))


@pytest.mark.parametrize(("multiple", "padded"), [(None, False), (None, True), (8, True)])
def test_the_longest_batch_is_that_of_all_that_are_made(
    multiple: int | None, padded: bool, toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen and rejected answers are padded to the longest of all, so that sums of both mislead, unless the padding is
    taken out."""
    from ft_core.training import replan, speed

    def long(word: str, count: int) -> str:
        return " ".join([word] * count)

    even = [{"prompt": "do you know ", "chosen": long("sun", 12), "rejected": long("cats", 12)}] * 3
    uneven = [{"prompt": "do you know ", "chosen": long("sun", 20), "rejected": "no"}]
    toy.write_rows(tmp_path / "uneven.jsonl", [*even, *uneven, *toy.rows(9, seed=1)])
    seen: list[tuple[int, list[int]]] = []

    def tokens(batch: dict[str, Any]) -> int:
        return batch["input_ids"].numel() if padded else int(batch["attention_mask"].sum())

    def note(trainer: Any) -> Any:
        assert (trainer.scores is None) == padded
        found = longest(trainer)
        seen.append((tokens(found), [tokens(batch) for batch in trainer.get_train_dataloader()]))
        return found

    longest = replan.longest_batch
    monkeypatch.setattr(replan, "longest_batch", note)
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    monkeypatch.setattr("ft_core.training.run.speed_up", lambda *args: None)
    if padded:  # as a model whose family is not known
        monkeypatch.setattr("ft_rl.scoring.put_scores", lambda model: None)
    for batch_size in (1, 2, 3):
        values = config(toy, tiny_model, tmp_path, training={"batch_size": batch_size, "max_steps": None, "epochs": 1})
        values |= {"data": str(tmp_path / "uneven.jsonl"), "output": str(tmp_path / f"run-{batch_size}")}
        values |= {"eval_data": None, "reward": {"pad_to_multiple_of": multiple}}
        train(values, say=lambda line: None)
    assert len(seen) == 3
    for found, every in seen:
        assert found == max(every)
