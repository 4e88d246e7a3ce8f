"""A model that a trainer has wrapped, as it was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_loaded", "as_saved", "widen_whole"]


def widen_whole(model: Any) -> int:
    """Let modules that are trained whole beside an adapter have float32 weights, as those of a model that is trained in
    full have: of 16 bits most updates are lost in rounding. How many numbers that are."""
    count = 0
    for parameter, dtype in _whole(model):
        if dtype.itemsize == 2:
            parameter.data = parameter.data.float()
            count += parameter.numel()
    return count


@contextmanager
def as_saved(model: Any) -> Iterator[None]:
    """Within it modules that are trained whole are in the format of what they take the place of."""
    wide = []
    for parameter, dtype in _whole(model):
        if parameter.dtype != dtype:
            wide.append((parameter, parameter.data))
            parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in wide:
            parameter.data = data


@contextmanager
def as_loaded(model: Any) -> Iterator[None]:
    """Within it the model computes as one that was loaded does: accelerate has wrapped its forward in autocast, and
    modules that are trained whole have wider weights."""
    plain, wrapped = vars(model).get("_original_forward"), vars(model).get("forward")
    with as_saved(model):
        if plain is None or wrapped is None:
            yield
            return
        model.forward = plain
        try:
            yield
        finally:
            model.forward = wrapped


def _whole(model: Any) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Weights of modules that are trained whole, and the format of what each takes the place of."""
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = dict(module.original_module.named_parameters())
            for copy in module.modules_to_save.values():
                for name, parameter in copy.named_parameters():
                    if parameter.is_floating_point() and name in own:
                        yield parameter, own[name].dtype
