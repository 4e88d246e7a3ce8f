"""Parts with a learning rate of their own, by any optimizer and schedule."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from ft_core.config.schema import Optimizer, Scheduler
from ft_core.errors import ConfigError
from ft_core.training.optimizers import check_rates, give_rates
from ft_core.training.trainer import RunTrainerMixin

RATES = {"tower": (r"(.*\.)?tower(\..*)?", 1.0e-3), "other": (r"other\..*", 5.0e-4)}
BASE = 1.0e-2
STEPS = 5


class Model(torch.nn.Module):
    """Three parts, each with a matrix, which decays, and a bias, which does not; one matrix is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.tower, self.other = (torch.nn.Linear(8, 8) for _ in range(3))
        self.tower.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        hidden = self.other(self.tower(self.text(input_ids.float())))
        return {"loss": (hidden - 1).square().mean(), "logits": hidden}


def trainer_of(folder: Any, rates: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    class Made(RunTrainerMixin, Trainer):
        """The run's trainer without a method."""

    arguments = {
        "output_dir": str(folder),
        "learning_rate": BASE,
        "max_steps": STEPS,
        "weight_decay": 0.1,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        **options,
    }
    rows = [{"input_ids": torch.randint(5, (8,), generator=torch.Generator().manual_seed(n))} for n in range(20)]
    made = Made(model=Model(), args=TrainingArguments(**arguments), train_dataset=rows)
    made.rates = rates
    return made


def groups_of(trainer: Any) -> dict[str, tuple[float, float]]:
    """Each parameter's rate at its peak, and its decay."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)]: (group.get("initial_lr", group["lr"]), group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimizer_gives_each_part_its_rate(optimizer: str, tmp_path: Any) -> None:
    if "paged" in optimizer and not torch.cuda.is_available():
        pytest.skip("paged states need a GPU")
    trainer = trainer_of(tmp_path, RATES, optim=optimizer)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    expected = {"text": BASE, "tower": 1.0e-3, "other": 5.0e-4}
    assert groups_of(trainer) == {
        f"{part}.{kind}": (rate, 0.1 if kind == "weight" else 0.0)
        for part, rate in expected.items()
        for kind in ("weight", "bias")
    }
    assert trainer.optimizer.param_groups[0]["initial_lr"] == BASE
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in trainer.model.named_parameters()}
    assert moved["tower.frozen"] == 0.0
    assert all(distance > 0 for name, distance in moved.items() if name != "tower.frozen")
    if "adam" in optimizer or "lion" in optimizer:  # a step of theirs is about as long as the rate
        assert moved["text.bias"] > 4 * moved["tower.bias"] > 4 * moved["other.bias"] / 2


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_a_schedule_scales_all_rates_and_they_are_logged(scheduler: str, tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, RATES, lr_scheduler_type=scheduler)
    seen: list[list[float]] = []
    step = torch.optim.AdamW.step

    def recorded(optimizer: Any, *args: Any, **options: Any) -> Any:
        seen.append([group["lr"] for group in optimizer.param_groups if group["params"]])
        return step(optimizer, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        trainer.train()
    assert len(seen) == STEPS
    for rates in seen:  # matrices and biases of the text, then of the parts
        shares = [rate / peak for rate, peak in zip(rates, [BASE, BASE, 1e-3, 5e-4, 1e-3, 5e-4], strict=True)]
        assert shares == pytest.approx([shares[0]] * 6, rel=1e-12)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for row in logged:
        assert row["tower_learning_rate"] == pytest.approx(row["learning_rate"] * 0.1, rel=1e-12)
        assert row["other_learning_rate"] == pytest.approx(row["learning_rate"] * 0.05, rel=1e-12)


def test_without_rates_nothing_changes(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, {})
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 2
    assert not any(key.endswith("_learning_rate") for row in trainer.state.log_history for key in row)


def test_a_resumed_run_has_the_same_rates(tmp_path: Any) -> None:
    whole = trainer_of(tmp_path / "whole", RATES)
    whole.train()
    trainer_of(tmp_path, RATES, save_strategy="steps", save_steps=3).train()
    resumed = trainer_of(tmp_path, RATES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert groups_of(resumed) == groups_of(whole)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rates_are_those_of_the_parameters_whose_names_match() -> None:
    model = Model()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "momentum": 0.5}], lr=1.0)
    give_rates(optimizer, model, {"tower": (r"tower\..*", 0.25)})
    assert [(len(g["params"]), g["lr"], g["momentum"]) for g in optimizer.param_groups] == [
        (4, 1.0, 0.5),
        (3, 0.25, 0.5),
    ]


def test_a_rate_of_what_is_not_trained_is_refused() -> None:
    model = Model()
    check_rates(model, RATES, "vision")
    model.tower.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"vision.tower_learning_rate: 0.001 is for parameters of which none is"):
        check_rates(model, RATES, "vision")
