"""What `ft plan` counts beside the model that is trained: the bytes that a training then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ft_core.config.load import check_config
from ft_core.errors import FtError
from ft_core.planning import find_card, find_outline, plan
from ft_core.planning.load import load_of
from ft_core.training import train
from ft_rl.grpo_trainer import GrpoTrainer
from ft_rl.rewards import resolve_rewards


def values(model: Path, method: str, **changes: Any) -> dict[str, Any]:
    given = {
        "model": str(model),
        "method": method,
        "data": str(model / "none.jsonl"),
        "max_length": 32,
        "lora": {"r": 4},
        "training": {"batch_size": 2, "gradient_accumulation": 1},
    }
    return given | changes


def parts(given: dict[str, Any]) -> dict[str, int]:
    config = check_config(given)
    found: dict[str, int] = plan(config, find_outline(config), find_card("RTX 4090")).peak.parts
    return found


def bytes_of(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def judged_by(reference: Path) -> list[dict[str, Any]]:
    return [{"name": "reward-model", "model": str(reference)}]


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_an_adapter_on_the_policys_base_is_no_second_model(
    steep_model: Path, tiny_model: Path, judge: Path, method: str
) -> None:
    from safetensors.torch import load_file

    shared = parts(values(steep_model, method, rewards=judged_by(judge)))["reward model"]
    adapter = load_file(judge / "adapter" / "adapter_model.safetensors")
    assert shared == 4 * sum(tensor.numel() for tensor in adapter.values())
    # The same beside another policy: what is loaded then, whose head is there twice, as PEFT has it.
    apart = parts(values(tiny_model, method, rewards=judged_by(judge)))["reward model"]
    (reward,) = resolve_rewards(judged_by(judge)).functions
    loaded: Any = reward.function
    dtypes = {p.dtype for name, p in loaded.model.named_parameters() if "lora_" not in name}
    if dtypes == {torch.float32}:  # a CPU without 16-bit products; plans are for GPUs
        loaded.model.bfloat16()
        apart -= 2 * sum(tensor.numel() for name, tensor in adapter.items() if "lora_" in name)
    head = adapter["base_model.model.score.weight"].numel()
    assert apart == bytes_of(loaded.model) + head * (4 - 2)
    # A rank or a length that is tried changes nothing; weights that are quantized make it another base.
    assert parts(values(steep_model, method, rewards=judged_by(judge), lora={"r": 2}))["reward model"] == shared
    assert parts(values(steep_model, method, rewards=judged_by(judge), quantization="nf4"))["reward model"] == apart


def test_whole_reward_models(toy: Any, steep_model: Path, make_judge: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(steep_model, num_labels=1, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "classifier")
    full = make_judge(steep_model, tmp_path, lora=None, training={"max_steps": 1})
    for reference in (tmp_path / "classifier", full):
        found = parts(values(steep_model, "ppo", rewards=judged_by(reference)))
        assert found["reward model"] == bytes_of(model)
    both = [*judged_by(full), {"name": "format"}, *judged_by(full)]
    assert parts(values(steep_model, "grpo", rewards=both))["reward model"] == 2 * bytes_of(model)
    assert "reward model" not in parts(values(steep_model, "grpo", rewards=["format"]))
    with pytest.raises(FtError, match=r"no run or model folder .*nowhere"):
        parts(values(steep_model, "grpo", rewards=judged_by(tmp_path / "nowhere")))


def test_a_reference_of_full_fine_tuning(
    toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large as what TRL's trainer then holds."""
    held: list[int] = []
    own = GrpoTrainer.train

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        held.append(0 if self.ref_model is None else bytes_of(self.ref_model))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(GrpoTrainer, "train", seen)
    prompts = [{"prompt": row["prompt"].strip()} for row in toy.rows(8, seed=1)]
    for number, (beta, lora) in enumerate([(0.05, None), (0.0, None), (0.05, {"r": 4})]):
        given = values(tiny_model, "grpo", lora=lora, rewards=["format"])
        given |= {
            "data": str(toy.write_rows(tmp_path / "prompts.jsonl", prompts)),
            "training": {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 1},
            "grpo": {"beta": beta, "num_generations": 2, "max_completion_length": 2},
            "output": str(tmp_path / f"run-{number}"),
        }
        train(given, say=lambda line: None)
        assert parts(given).get("reference model", 0) == held[-1]
    assert held[0] > 0
    assert held[1:] == [0, 0]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_that_is_worked_out_before_is_not_held(tiny_model: Path, method: str) -> None:
    def held(lora: Any, **settings: Any) -> tuple[Any, ...]:
        return load_of(check_config(values(tiny_model, method, lora=lora, **{method: settings}))).held

    assert not held(None)
    assert not held({"r": 4}, precompute_ref_log_probs=False)
    (copy,) = held(None, precompute_ref_log_probs=False)
    assert (copy.model, copy.itemsize, copy.head) == (str(tiny_model), 4, "language-model")
