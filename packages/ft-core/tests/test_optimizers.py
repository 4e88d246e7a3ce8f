"""Optimizers whose updates are queued: the library's own updates, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ft_core.training.optimizers import QueuedUpdates, queued

bitsandbytes = pytest.importorskip("bitsandbytes")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def trained(kind: Any, device: str, **settings: Any) -> list[torch.Tensor]:
    """Parameters after some steps; one never has a gradient, and one gets its first in the third step."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n, 256, generator=generator).to(device)) for n in (64, 4, 96, 33)]
    optimizer = kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-2}], lr=1e-3, **settings)
    for step in range(6):
        for i, parameter in enumerate(parameters):
            if i != 1 and (i != 2 or step > 1):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit", "PagedAdamW8bit"])
def test_the_same_updates(name, device):
    kind = getattr(bitsandbytes.optim, name)
    if name.startswith("Paged") and device == "cpu":
        pytest.skip("paged states need a GPU")
    changed = queued(kind)
    assert issubclass(changed, QueuedUpdates)
    assert (changed.__name__, changed.__module__) == (kind.__name__, kind.__module__)
    expected, found = trained(kind, device), trained(changed, device)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_wait_between_updates(monkeypatch):
    waits = []
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", waits.append)
    trained(bitsandbytes.optim.AdamW8bit, "cpu")
    assert len(waits) == 16
    waits.clear()
    trained(queued(bitsandbytes.optim.AdamW8bit), "cpu")
    assert len(waits) == 2  # the first step is the library's, which sets itself up


def test_others_stay():
    assert queued(torch.optim.AdamW) is torch.optim.AdamW
    factory = len
    assert queued(factory) is factory


def test_a_closure():
    parameter = torch.nn.Parameter(torch.ones(64, 256))
    optimizer = queued(bitsandbytes.optim.AdamW8bit)([parameter], lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


@pytest.mark.parametrize(("name", "is_queued"), [("adamw_8bit", True), ("adamw_torch", False)])
def test_in_a_trainer(tiny, tmp_path, name, is_queued):
    import transformers

    from ft_core.training.trainer import RunTrainerMixin

    class Trainer(RunTrainerMixin, transformers.Trainer):
        pass

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, optim=name, use_cpu=True, report_to="none", save_strategy="no"
    )
    ids = torch.arange(3, 40)
    rows = [{"input_ids": ids, "labels": ids}] * 8
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, QueuedUpdates) is is_queued
    assert trainer.state.num_input_tokens_seen == 3 * 8 * len(ids)
