"""What a gradient cannot do, said in one line where it is asked for, instead of numbers that are wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["refuse_gradients", "refuse_second_derivative", "refuse_twice"]


def refuse_twice(ctx: Any, name: str) -> None:
    """Raise in a second backward pass through memory that the first has written over."""
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            f"{name}: backward was called a second time; it writes gradients over what forward kept. "
            f"Call {name} again, or add the losses up before one backward"
        )
    ctx.consumed = True


def refuse_second_derivative(name: str) -> None:
    """Raise in a backward pass that is itself to be differentiated, for gradients that were made in forward.

    These hang on nothing that requires a gradient: a penalty on them would be left out, and nobody told.
    """
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise RuntimeError(
            f"{name}: the gradient cannot be differentiated again (create_graph=True); leave create_graph out, or for "
            "gradients of gradients make the logits with torch, hidden @ weight.T, and the loss of them"
        )


def refuse_gradients(name: str, *tensors: Tensor) -> None:
    """Raise where a function without gradients is given what wants one, which would stay without it."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            f"{name}: an argument requires a gradient, which is not computed here; call it under torch.no_grad(), or "
            "detach the argument"
        )
