"""Optimizers whose updates are queued: the library's own updates, bit for bit."""

from __future__ import annotations

import gc
import weakref
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
    trained(kind, device)  # on a CPU the first update of a process rounds otherwise now and then, the library's own too
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


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_state_from_a_file_is_paged_again(device, paged, tmp_path):
    """A file keeps the mark of paged memory with numbers that no longer lie in any."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, 256, generator=generator).to(device) for n in (500, 20)]
    gradients = [[torch.randn(n, 256, generator=generator).to(device) for n in (500, 20)] for _ in range(6)]
    kind = queued(bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit)

    def go_on(parameters: list[torch.nn.Parameter], optimizer: Any, steps: Any) -> list[torch.Tensor]:
        for step in steps:
            for parameter, gradient in zip(parameters, gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        return [p.detach().clone() for p in parameters]

    whole = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = kind(whole, lr=1e-2)
    middle = go_on(whole, optimizer, range(3))
    if device == "cpu":
        for values in optimizer.state.values():
            values["state1"].is_paged, values["state1"].page_deviceid = True, 0  # as a GPU's are
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    if device == "cpu":
        for values in optimizer.state.values():
            vars(values["state1"]).clear()
    end = go_on(whole, optimizer, range(3, 6))
    again = [torch.nn.Parameter(t.clone()) for t in middle]
    other = kind(again, lr=1e-2)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location=device, weights_only=True))
    for parameter, values in other.state.items():
        is_paged = paged and device == "cuda" and parameter.numel() >= 100_000
        assert getattr(values["state1"], "is_paged", False) == is_paged
        assert getattr(values["state2"], "is_paged", False) == is_paged
    found = go_on(again, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(end, found, strict=True))


def test_the_default_s_state_lies_where_it_was_planned():
    from types import SimpleNamespace

    from ft_core.config import TrainConfig
    from ft_core.training.optimizers import optimizer_of

    planned: Any = SimpleNamespace(peak=SimpleNamespace(optimizer="paged_adamw_8bit"))
    config = TrainConfig(model="m", data="d")
    assert config.training.optimizer == "adamw_8bit"
    assert optimizer_of(config, None) == "adamw_8bit"
    assert optimizer_of(config, planned) == "paged_adamw_8bit"
    other = TrainConfig(model="m", data="d", training={"optimizer": "adamw_torch"})
    assert optimizer_of(other, planned) == "adamw_torch"


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
    numbers = model.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 6 * numbers * trainer.state.num_input_tokens_seen  # as transformers counts them

    embedding = weakref.ref(model.get_input_embeddings())
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    assert not manager.module_weight_config_triple
    assert not manager.pid2config
    assert not manager.index2config
    del trainer, optimizer, model
    gc.collect()
    assert embedding() is None


@pytest.mark.gpu
def test_a_paged_run_goes_on_as_it_was(ft, configure, metrics, tmp_path, rounding):
    """Adapters of more than 100,000 numbers each, whose state is paged, and again after a checkpoint."""

    def train(name: str, optimizer: str, steps: int, *words: str) -> list[float]:
        training = {"max_steps": steps, "optimizer": optimizer, "save_every": 3, "scheduler": "constant"}
        config = configure(lora={"r": 2048, "alpha": 64}, training=training, output=str(tmp_path / name))
        done = ft("train", config, *words)
        assert done.code == 0, done.err
        return [row["loss"] for row in metrics(tmp_path / name)]

    whole = pytest.approx(train("whole", "paged_adamw_8bit", 6), rel=rounding, abs=0)
    assert train("plain", "adamw_8bit", 6) == whole
    train("parts", "paged_adamw_8bit", 3)
    assert train("parts", "paged_adamw_8bit", 6, "--resume") == whole
    train("turns", "paged_adamw_8bit", 3)
    assert train("turns", "adamw_8bit", 6, "--resume") == whole
    train("back", "adamw_8bit", 3)
    assert train("back", "paged_adamw_8bit", 6, "--resume") == whole
