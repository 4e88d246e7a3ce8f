"""`ft train` on the fast layers. Their references compute here, as on a GPU the kernels do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_core.models import device, loading
    from ft_core.training import run

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))


@pytest.fixture
def fast_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_core.training import speed

    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)


def losses(ft: Any, metrics: Any, configure: Any, run: Path, **changes: Any) -> tuple[list[float], str]:
    done = ft("train", configure(output=str(run), **changes))
    assert done.code == 0, done.err
    return [row["loss"] for row in metrics(run)], done.out + done.err


@pytest.mark.parametrize("kind", ["lora", "packed", "nf4", "int8", "dora", "full"])
def test_losses_are_those_of_plain_layers(kind, ft, configure, metrics, tmp_path, monkeypatch):
    changes: dict[str, Any] = {
        "lora": {"packing": False},
        "packed": {"packing": True, "training": {"max_steps": 6, "batch_size": 2, "learning_rate": 1e-2}},
        "nf4": {"quantization": "nf4"},
        "int8": {"quantization": "int8"},
        "dora": {"lora": {"r": 8, "dora": True}},
        "full": {"lora": None},
    }[kind]
    changes = {"training": {"max_steps": 6, "learning_rate": 1e-3}, **changes}
    from ft_core.training import speed

    monkeypatch.setattr(speed, "runs_kernels", lambda device: False)
    plain, said = losses(ft, metrics, configure, tmp_path / "plain", **changes)
    assert "fast layers" not in said
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    fast, said = losses(ft, metrics, configure, tmp_path / "fast", **changes)
    assert "fast layers: checked against transformers' own on a row" in said
    # bitsandbytes' 8-bit products round the activations to 8 bits; ours do not.
    assert fast == pytest.approx(plain, rel=3e-2 if kind == "int8" else 1e-4)


def test_a_mistake_is_refused_by_name(ft, configure, tmp_path, monkeypatch, fast_layers):
    from ft_core.fast import layer

    block = layer.kernels.AttentionBlock
    call = block.__call__
    monkeypatch.setattr(block, "__call__", lambda self, x, *, sin, **words: call(self, x, sin=sin * 0.9, **words))
    done = ft("train", configure(output=str(tmp_path / "run")))
    assert done.code == 2
    assert "the fast layers do not compute what transformers' own do" in done.err
    assert "gradient of base_model.model.model.layers." in done.err
    assert done.err.strip().splitlines()[-1].startswith("ft train: the fast layers")
    assert not list((tmp_path / "run").glob("adapter"))
    done = ft("train", configure(output=str(tmp_path / "other"), verify="off", training={"max_steps": 1}))
    assert done.code == 0, done.err


def test_layers_that_fail_are_taken_out(ft, configure, metrics, tmp_path, monkeypatch, fast_layers):
    from ft_core.fast import layer

    def fail(*args: Any, **keywords: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(layer.kernels.MLPBlock, "__call__", fail)
    done = ft("train", configure(output=str(tmp_path / "run"), training={"max_steps": 2}))
    assert done.code == 0, done.err
    assert "the fast ones fail on this machine (RuntimeError: no such instruction)" in done.out + done.err
    assert len(metrics(tmp_path / "run")) == 2


def test_an_unknown_family_says_why(ft, configure, tmp_path, monkeypatch, fast_layers):
    from ft_core.fast import find

    monkeypatch.setattr(find, "_spec", lambda model_type: _raise(find, model_type))
    done = ft("train", configure(output=str(tmp_path / "run"), training={"max_steps": 1}))
    assert done.code == 0, done.err
    assert "trained on transformers' own layers, slower than need be: the family" in done.out + done.err


def _raise(find: Any, model_type: str) -> Any:
    raise find.NotFast(f"the family {model_type} is not known to them")


def test_resuming_gives_the_same_losses(ft, configure, metrics, tmp_path, fast_layers):
    training = {"learning_rate": 1e-2, "save_every": 2, "scheduler": "constant", "warmup_ratio": 0.0}
    whole, _ = losses(ft, metrics, configure, tmp_path / "whole", training={"max_steps": 6, **training})
    config = configure(output=str(tmp_path / "parts"), training={"max_steps": 4, **training})
    assert ft("train", config).code == 0
    done = ft("train", config, "--resume", "training.max_steps=6")
    assert done.code == 0, done.err
    assert [row["loss"] for row in metrics(tmp_path / "parts")] == whole


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_other_activations_give_the_same_losses(kind, ft, configure, metrics, tmp_path, monkeypatch, fast_layers):
    from ft_core.fast import offload

    monkeypatch.setattr(offload, "LEAST", 0)
    changes = {"training": {"max_steps": 4, "learning_rate": 1e-2, "gradient_accumulation": 2}, "packing": True}
    changes |= {"lora": {"r": 8, "dropout": 0.1}} if kind == "lora" else {"lora": None}
    found = [
        losses(ft, metrics, configure, tmp_path / activations, activations=activations, **changes)[0]
        for activations in ("keep", "auto", "recompute", "offload")
    ]
    assert found[1:] == [found[0]] * 3
