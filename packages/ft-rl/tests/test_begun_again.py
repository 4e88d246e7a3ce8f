"""A step of GRPO or PPO that runs out of memory is computed again, on the completions that it has."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from ft_core.fast.scores import Unpadded
from ft_core.memory import StillOutOfMemory
from ft_core.training import speed, train
from ft_core.training.moment import Moment
from ft_rl.begun_again import BegunAgainMixin, longest_prompts, made_up
from ft_rl.grpo_trainer import GrpoTrainer
from ft_rl.ppo_trainer import PpoTrainer
from ft_rl.rollouts.own_model import OwnModel

REWARD = """
calls = []

def kindness(prompts, completions, **columns):
    calls.append(len(prompts))
    kind = {"please", "gladly", "thanks", "welcome", "sure"}
    return [sum(word in kind for word in text.split()) / max(len(text.split()), 1) for text in completions]
"""
MICRO = 2
"""Micro-batches of a step."""
CLOCKS = ("seconds", "time", "per_second", "memory", "wait", "idle", "finished")


class FailsAt(TorchDispatchMode):
    """Within it one operation has no memory."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError(f"out of memory: {func}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    run = importlib.import_module("ft_core.training.run")
    device = dataclasses.replace(run.pick_device(), dtype="float32")
    monkeypatch.setattr(run, "pick_device", lambda: device)


@pytest.fixture
def made(toy: Any, steep_model: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """`made(name, method, **settings)`: two steps with dropout, and what they left."""

    def call(name: str, method: str = "grpo", **settings: Any) -> SimpleNamespace:
        rows = [{"prompt": row["prompt"].strip()} for row in toy.rows(32, seed=1)]
        for row in rows[::2]:
            row["prompt"] += " the sun is round"
        toy.write_rows(tmp_path / "prompts.jsonl", rows)
        (tmp_path / "kind.py").write_text(REWARD)
        lines: list[str] = []
        values = {
            "model": str(steep_model),
            "method": method,
            "data": str(tmp_path / "prompts.jsonl"),
            "rewards": [f"{tmp_path / 'kind.py'}:kindness"],
            "max_length": 32,
            "lora": {"r": 8, "dropout": 0.2},
            "output": str(tmp_path / name),
            "training": {"max_steps": 2, "batch_size": 8, "gradient_accumulation": MICRO, "learning_rate": 2e-2},
            method: {"max_completion_length": 8, "disable_dropout": False, **settings},
        }
        run = train(values, say=lines.append).run
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if not any(word in k for word in CLOCKS)} for row in logged]
        weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        return SimpleNamespace(
            rows=kept, weights=weights, samples=(run / "samples.jsonl").read_bytes(), said=lines, run=run
        )

    return call


def same(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    return (one.rows, one.weights, one.samples) == (other.rows, other.weights, other.samples)


def after_forward(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """One micro-batch, from 0 on, has no memory once its loss is there; what this gives is how many there were."""
    calls: list[int] = []
    for kind in (GrpoTrainer, PpoTrainer):
        own = kind.__dict__["_compute_loss"]

        def loss(self: Any, *args: Any, own: Any = own, kind: Any = kind, **kwargs: Any) -> Any:
            found = own(self, *args, **kwargs)
            if type(self) is kind:
                calls.append(len(calls))
                if calls[-1] == number:
                    raise torch.OutOfMemoryError("out of memory")
            return found

        patch.setattr(kind, "_compute_loss", loss)
    return calls


def in_backward(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """The same in the middle of the backward pass of the policy's loss."""
    calls: list[int] = []
    own = Accelerator.backward

    def backward(self: Any, loss: torch.Tensor, **kwargs: Any) -> None:
        calls.append(len(calls))
        if calls[-1] != number:
            return own(self, loss, **kwargs)
        with FailsAt(20):
            own(self, loss, **kwargs)
        return None

    patch.setattr(Accelerator, "backward", backward)
    return calls


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """transformers' layers, or the fast ones, whose references run on a CPU too, and which try the longest first."""
    if request.param == "fast":
        monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    return str(request.param)


CASES = [
    ("plain", "grpo", {}, after_forward, 2),  # the first of step 2, whose completions have just been written
    ("plain", "grpo", {}, in_backward, 3),  # the second: gradients and counts of the first are there
    ("plain", "grpo", {"num_iterations": 2, "beta": 0.1}, after_forward, 3),
    ("plain", "grpo", {"steps_per_generation": 1}, after_forward, 3),  # two rollouts in a step
    ("plain", "ppo", {"num_ppo_epochs": 2}, after_forward, 1),  # the values' gradients are there already
    ("plain", "ppo", {"num_ppo_epochs": 2}, in_backward, 4),
    ("fast", "grpo", {}, after_forward, 3),  # with the longest before them
]


@pytest.mark.parametrize(("kind", "method", "settings", "fault", "number"), CASES, indirect=["kind"])
def test_once_more_to_the_same_numbers(
    kind: str, made: Any, monkeypatch: pytest.MonkeyPatch, method: str, settings: Any, fault: Any, number: int
) -> None:
    wrote: list[int] = []
    generate = OwnModel.generate
    monkeypatch.setattr(OwnModel, "generate", lambda *a, **k: (wrote.append(k["step"]), generate(*a, **k))[1])
    whole = made("whole", method, **settings)
    steps = list(wrote)
    wrote.clear()
    with monkeypatch.context() as patch:
        calls = fault(patch, number)
        again = made("again", method, **settings)
    assert len(calls) > number
    (line,) = [line for line in again.said if "planned anew" in line]
    assert line.startswith("out of memory in step ")
    assert line.endswith("; it is computed again")
    assert wrote == steps  # not a completion was drawn twice
    assert len(again.rows) >= 2
    assert same(again, whole)
    tried = [line for line in again.said if line.startswith("the longest batch fits")]
    assert len(tried) == (kind == "fast")


def test_what_the_tests_above_can_see(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what puts random numbers and counts back, the numbers are others."""
    whole = made("whole")
    with monkeypatch.context() as patch:
        after_forward(patch, 2)
        restore = Moment.restore
        patch.setattr(Moment, "restore", lambda self, trainer: setattr(trainer, "_step", self.counts["_step"]))
        changed = made("changed")
    assert restore is Moment.restore
    assert changed.rows != whole.rows


@pytest.mark.parametrize("kind", ["fast"], indirect=True)
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_trying_the_longest_changes_nothing(kind: str, made: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    tried: list[Any] = []
    longest = BegunAgainMixin.longest
    with monkeypatch.context() as patch:
        patch.setattr(BegunAgainMixin, "longest", lambda self: None)
        plain = made("plain", method, beta=0.1) if method == "grpo" else made("plain", method)
        assert not any("longest batch" in line for line in plain.said)
    monkeypatch.setattr(BegunAgainMixin, "longest", lambda self: (tried.append(longest(self)), tried[-1])[1])
    first = made("first", method, beta=0.1) if method == "grpo" else made("first", method)
    assert same(first, plain)
    (batch,) = tried
    assert batch["completion_ids"].shape == (8, 8)
    # Half of the prompts have eight words: one of a step's two, which comes with each of its eight completions; by PPO
    # eight of a step's sixteen.
    assert batch["prompt_mask"].sum(1).tolist() == [8] * 8
    (line,) = [line for line in first.said if line.startswith("the longest batch fits")]
    assert line.startswith("the longest batch fits: 128 tokens, ")


@pytest.mark.parametrize("kind", ["fast"], indirect=True)
def test_a_longest_batch_that_does_not_fit_is_planned_anew(
    kind: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made("whole")
    with monkeypatch.context() as patch:
        after_forward(patch, 0)
        again = made("again")
    (line,) = [line for line in again.said if "planned anew" in line]
    assert line.startswith("out of memory in the longest batch, before step 1: planned anew, ")
    assert same(again, whole)


def test_a_second_time_ends_the_run(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(GrpoTrainer, "_compute_loss", never)
    with pytest.raises(Exception, match="out of memory again, after planning anew") as caught:
        made("run")
    assert isinstance(caught.value, StillOutOfMemory) or isinstance(caught.value.__cause__, StillOutOfMemory)


def test_completions_that_do_not_fit_are_not_written_again(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def never(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(OwnModel, "generate", never)
    with pytest.raises(Exception, match="out of memory") as caught:
        made("run")
    assert "planned anew" not in str(caught.value)
    assert len(calls) == 1


def test_the_longest_prompts_are_those_that_come_together() -> None:
    rows = [7, 3, 9, 1, 9, 2]
    arguments = SimpleNamespace(max_steps=0, gradient_accumulation_steps=1, per_device_train_batch_size=3)
    batches = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]
    trainer = SimpleNamespace(
        args=arguments, train_dataset=rows, get_train_dataloader=lambda: SimpleNamespace(batch_sampler=batches)
    )
    assert longest_prompts(trainer, rows) == [9, 9, 2]
    arguments.max_steps = 3  # the last is not reached
    assert longest_prompts(trainer, rows) == [9, 9, 1]
    arguments.max_steps = 2
    assert longest_prompts(trainer, rows) == [7, 7, 3]
    assert longest_prompts(trainer, rows[:3]) == []


def test_a_made_up_batch_is_padded_as_trls() -> None:
    batch = made_up([5, 6], [3, 1], 4, torch.device("cpu"))
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["prompt_ids"].tolist() == [[0, 6, 5], [0, 0, 1]]
    assert batch["completion_ids"].tolist() == [[5, 6, 5, 6]] * 2
    assert int(batch["num_items_in_batch"]) == 8


def test_nothing_is_shared_in_a_made_up_batch() -> None:
    """What rows share would be computed once, and the longest batch would take less than others."""
    batch = made_up([5, 6], [9] * 8, 20, torch.device("cpu"))
    ids, mask = (torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask"))
    assert Unpadded.of(ids, mask, share=True).ids.numel() == 8 * 29
