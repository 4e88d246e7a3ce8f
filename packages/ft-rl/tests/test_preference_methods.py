"""DPO, KTO and ORPO as a person uses them: through ft_core's train and evaluate, on a preference that can be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ConfigError, DataError
from ft_core.training import train
from ft_rl.collating import LabelledCollator

METHODS = ("dpo", "kto", "orpo")


def config(toy: Any, model: Path, folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    toy.write_rows(folder / "pairs.jsonl", toy.rows(256, seed=1, twins=True))
    toy.write_rows(folder / "held_out.jsonl", toy.rows(64, seed=2, twins=True))
    training = {"max_steps": 60, "batch_size": 16, "gradient_accumulation": 1, "learning_rate": 2e-2}
    values = {
        "model": str(model),
        "method": method,
        "data": str(folder / "pairs.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "max_length": 32,
        "lora": {"r": 8},
        "output": str(folder / f"run-{method}"),
    }
    return values | changes | {"training": training | changes.get("training", {})}


@pytest.fixture(scope="module", params=METHODS)
def run(request: Any, toy: Any, steep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    method = request.param
    values = config(toy, steep_model, tmp_path_factory.mktemp(method), method)
    values[method] = {"beta": {"dpo": 0.1, "kto": 0.5, "orpo": 1.0}[method]}
    result = train(values, say=said.append)
    assert result.status == "finished", said
    return result.run


def test_it_learns_the_preference(run: Path) -> None:
    measured = json.loads((run / "evaluation.json").read_text())
    accuracy = measured["metrics"]["accuracy"]
    # Untrained, 64 fair coins, of which 58 fall alike once in 10^11 (or, against a reference that is the model, nothing
    # but ties). KTO's is over all pairs of 64 wanted and 64 unwanted answers to different prompts: by chance 0.5, with
    # a standard deviation of 0.05.
    assert accuracy["before"] < 0.7
    assert accuracy["after"] >= (0.7 if run.name == "run-kto" else 0.9)
    name = "log_odds_ratio" if "log_odds_ratio" in measured["metrics"] else "margin"
    assert measured["metrics"][name]["after"] > measured["metrics"][name]["before"] + 0.1


def test_the_steps_are_recorded(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert all(row["tokens"] > 0 for row in steps)
    names = {"run-dpo": "rewards/margins", "run-kto": "rewards/margins", "run-orpo": "log_odds_ratio"}
    shown = [row[names[run.name]] for row in steps if names[run.name] in row]
    assert len(shown) >= 55
    assert sum(shown[-10:]) > sum(shown[:10])


@pytest.mark.parametrize("method", METHODS)
def test_full_fine_tuning(toy: Any, steep_model: Path, tmp_path: Path, method: str) -> None:
    values = config(toy, steep_model, tmp_path, method, lora=None, training={"learning_rate": 1e-3})
    result = train(values, say=lambda line: None)
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_biases_have_no_reference(toy: Any, steep_model: Path, tmp_path: Path, method: str) -> None:
    values = config(toy, steep_model, tmp_path, method, lora={"bias": "all"})
    with pytest.raises(ConfigError, match=f"lora.bias: all is not allowed with {method}"):
        train(values, say=lambda line: None)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_adapter_that_begins_as_something_has_no_reference(
    toy: Any, steep_model: Path, tmp_path: Path, method: str
) -> None:
    values = config(toy, steep_model, tmp_path, method, quantization="nf4", lora={"init_lora_weights": "loftq"})
    with pytest.raises(ConfigError, match=f"loftq is not allowed with {method}"):
        train(values, say=lambda line: None)


def test_kto_with_too_few_rows_trains_nothing_and_says_so(toy: Any, steep_model: Path, tmp_path: Path) -> None:
    values = config(toy, steep_model, tmp_path, "kto")
    toy.write_rows(tmp_path / "pairs.jsonl", toy.rows(3, seed=1))
    with pytest.raises(DataError, match="6 answers are too few for a batch of 16"):
        train(values, say=lambda line: None)


def test_rows_for_the_divergence_are_no_longer_than_others() -> None:
    features = [
        {"completion_ids": [1] * 10 + [2] * 2, "prompt_length": 10, "label": True},
        {"completion_ids": [3] * 2 + [4] * 10, "prompt_length": 2, "label": False},
    ]
    batch = LabelledCollator(0, max_length=12)(features)
    assert batch["KL_input_ids"].shape == (2, 12)
    assert batch["KL_input_ids"][0].tolist() == [1] * 10 + [4] * 2  # the other row's answer, cut
    assert batch["KL_completion_mask"][1].tolist()[:5] == [0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "exo_pair"}, "dpo.label_smoothing: 0.0 .*above 0 with exo_pair"),
        (
            {"loss_type": ["sigmoid", "aot"], "f_divergence_type": "forward_kl"},
            "dpo.f_divergence_type.*reverse_kl with aot",
        ),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "dpo.loss_weights.*one weight for each loss: 2"),
    ],
)
def test_losses_that_do_not_go_together(
    toy: Any, steep_model: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(config(toy, steep_model, tmp_path, "dpo", dpo=settings), say=lambda line: None)


def test_kto_needs_other_rows(toy: Any, steep_model: Path, tmp_path: Path) -> None:
    values = config(toy, steep_model, tmp_path, "kto", training={"batch_size": 1})
    with pytest.raises(ConfigError, match="batch_size: 1 is not allowed with kto"):
        train(values, say=lambda line: None)
    assert not (tmp_path / "run-kto").exists()
