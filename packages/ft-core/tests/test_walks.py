"""Walks over a model's modules that training does without: what they would have done is done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ft_core.training.walks import clearing_known, mode_known, parameters_known


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)))


@pytest.mark.parametrize("before", [True, False])
def test_a_model_is_put_into_training_mode_once(before: bool) -> None:
    model = make().train(before)
    with mode_known(model):
        assert model.train() is model
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()
        assert all(module.training for module in model.modules())
    assert "train" not in vars(model)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_cleared(to_none: bool) -> None:
    model = make()
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    with clearing_known(model, lambda: trained):
        model(torch.ones(3, 2)).sum().backward()
        assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
        model.zero_grad(set_to_none=to_none)
    left = [None if p.grad is None else p.grad.abs().sum().item() for p in model.parameters()]
    assert left == ([None] * 4 if to_none else [None, None, 0.0, 0.0])
    assert "zero_grad" not in vars(model)


def test_parameters_that_are_trained() -> None:
    model = make()
    trained = [model[0].weight]
    with parameters_known(model, lambda: trained):
        assert list(model.parameters()) == trained
    assert len(list(model.parameters())) == 4


def test_what_somebody_else_has_put_there_stays() -> None:
    model = make()
    calls: list[int] = []
    vars(model)["zero_grad"] = lambda: calls.append(1)
    with clearing_known(model, list):
        model.zero_grad()
    assert calls == [1]
    assert "zero_grad" in vars(model)
