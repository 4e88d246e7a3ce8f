"""Layers that are not the fast path's own, such as a vision tower's, computed again in backward."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ft_core.fast.swap import FastPath

__all__ = ["recompute_elsewhere"]


def recompute_elsewhere(path: FastPath) -> int:
    """Let trained layers beside the fast ones keep their input alone, by transformers' own checkpointing.

    Returns:
        how many there are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    own = {id(module) for layer in path.layers for module in layer.modules()}
    found = 0
    for module in path.model.modules():
        if not isinstance(module, GradientCheckpointingLayer) or id(module) in own:
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            module._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
            module.gradient_checkpointing = True
            found += 1
    return found
