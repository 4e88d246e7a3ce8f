"""The learning rate over a run: every step has one, however short the run is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ft_core.config.schema import Scheduler


def rates(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def made(name: str, steps: int, warmup: int) -> tuple[Any, Any]:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_every_step_has_a_rate(name: str) -> None:
    """After the warmup it is transformers' own, to the last digit; within it, even steps up to the peak."""
    from ft_core.training.schedule import rising

    for steps in (1, 2, 3, 9, 40):
        for warmup in sorted({min(w, steps - 1) for w in (0, 1, math.ceil(0.03 * steps), steps // 2, steps)}):
            plain = rates(*made(name, steps, warmup), steps)
            optimizer, scheduler = made(name, steps, warmup)
            found = rates(optimizer, rising(scheduler, warmup), steps)
            assert min(found) > 0
            assert found[warmup:] == plain[warmup:]
            if name == "constant":  # it has no warmup
                assert found == plain
            else:
                assert found[:warmup] == pytest.approx([2.0 * (k + 1) / (warmup + 1) for k in range(warmup)])


def test_a_schedule_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    """As a checkpoint has it: read back as plain values, without a pickle; also from one that began at nothing."""
    from ft_core.training.schedule import renewed, rising

    optimizer, scheduler = made("cosine", 20, 5)
    whole = rates(optimizer, rising(scheduler, 5), 20)
    for old in (False, True):
        optimizer, scheduler = made("cosine", 20, 5)
        scheduler = scheduler if old else rising(scheduler, 5)
        rates(optimizer, scheduler, 3)
        torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
        optimizer, scheduler = made("cosine", 20, 5)
        scheduler = rising(scheduler, 5)
        states = torch.load(tmp_path / "state.pt", weights_only=True)
        optimizer.load_state_dict(states[0])
        scheduler.load_state_dict(states[1])
        assert rates(optimizer, renewed(scheduler), 17) == whole[3:]


@pytest.mark.parametrize("scheduler", ["cosine", "polynomial"])
def test_a_run_of_one_step_learns(ft: Any, configure: Any, tmp_path: Path, metrics: Any, scheduler: str) -> None:
    """At the rate that is asked for; transformers' polynomial schedule would divide by zero after its warmup."""
    from safetensors.torch import load_file

    config = configure(training={"max_steps": None, "gradient_accumulation": 64, "scheduler": scheduler})
    done = ft("train", config)
    assert done.code == 0, done.err
    assert (
        "only 1 step in all: that may be too few to learn from; raise training.epochs to 10 or more, or lower "
        "training.gradient_accumulation (now 64) or training.batch_size (now 2)\n"
    ) in done.err
    assert done.out.startswith("done: 1 step, loss ")
    (row,) = metrics(tmp_path / "run")
    assert row["learning_rate"] == pytest.approx(5e-3)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    changed = [bool(tensor.any()) for name, tensor in adapter.items() if ".lora_B." in name]
    assert changed
    assert all(changed)  # they begin at zero


def test_a_warmup_of_the_whole_run_ends_at_the_peak(ft: Any, configure: Any, tmp_path: Path, metrics: Any) -> None:
    done = ft("train", configure(training={"warmup_ratio": 1.0, "scheduler": "polynomial"}))
    assert done.code == 0, done.err
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx(
        [1.25e-3, 2.5e-3, 3.75e-3, 5e-3]
    )


def test_a_finished_run_that_goes_on_has_a_rate_at_once(ft: Any, configure: Any, tmp_path: Path, metrics: Any) -> None:
    """The checkpoint holds that of a step after the last: none."""
    config = configure(training={"max_steps": 2, "warmup_ratio": 0})
    assert ft("train", config).code == 0
    done = ft("train", config, "training.max_steps=4", "--resume")
    assert done.code == 0, done.err
    expected = [0.5 * 5e-3 * (1 + math.cos(math.pi * k / steps)) for k, steps in ((0, 2), (1, 2), (2, 4), (3, 4))]
    assert [row["learning_rate"] for row in metrics(tmp_path / "run")] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("training", "steps", "said"),
    [
        ({}, 10, None),
        ({"max_steps": 3}, 3, None),  # whoever says so knows
        ({}, 9, "raise training.epochs to 2 or more, or lower training.gradient_accumulation (now 4) or training."),
        ({"epochs": 3, "batch_size": 1}, 6, "raise training.epochs to 5 or more, or lower training.gradient_accumu"),
        ({"epochs": 0.5, "batch_size": 1, "gradient_accumulation": 1}, 2, "raise training.epochs to 4 or more"),
        ({"epochs": 0.1, "batch_size": 1, "gradient_accumulation": 1}, 1, "raise training.epochs to 10 or more"),
    ],
)
def test_what_makes_more_steps(training: dict[str, Any], steps: int, said: str | None) -> None:
    from ft_core.config.load import check_config
    from ft_core.training.arguments import few_steps

    found = few_steps(check_config({"model": "m", "data": "d.jsonl", "training": training}), steps)
    assert found is None if said is None else f"; {said}" in str(found)
