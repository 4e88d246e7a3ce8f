"""Walks over all modules that transformers' trainer makes at each step, shortened while it trains.

An adapted model of 8 billion parameters has some four thousand modules. Putting each into training mode again, and
looking through all of them for gradients to clip and to clear, takes the host tens of milliseconds, in which the GPU
has nothing to do. Here a model that is in training mode already stays as it is, and gradients are looked for among the
parameters that are trained. Only the model that is trained is told so, and only for as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["clearing_known", "mode_known", "parameters_known"]


@contextlib.contextmanager
def mode_known(model: nn.Module) -> Iterator[None]:
    """In the body a model that is in training mode is not put into it again, module by module."""
    if not model.training:
        yield
        return
    own = model.train

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else own(mode)

    with _shadowed(model, train=train):
        yield


@contextlib.contextmanager
def clearing_known(model: nn.Module, trained: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """In the body ``model.zero_grad`` clears the gradients of the parameters that are trained: no other has one."""

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = parameter.grad.detach().zero_()

    with _shadowed(model, zero_grad=zero_grad):
        yield


@contextlib.contextmanager
def parameters_known(model: nn.Module, trained: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
    """In the body ``model.parameters`` gives those that are trained."""
    with _shadowed(model, parameters=lambda recurse=True: iter(trained())):
        yield


@contextlib.contextmanager
def _shadowed(model: nn.Module, **methods: Any) -> Iterator[None]:
    """Methods of this instance alone; nothing where somebody else has put one there."""
    if set(methods) & set(vars(model)):
        yield
        return
    vars(model).update(methods)
    try:
        yield
    finally:
        for name in methods:
            vars(model).pop(name, None)
