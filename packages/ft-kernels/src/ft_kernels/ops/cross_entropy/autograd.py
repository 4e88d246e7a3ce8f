"""Cross-entropy as a registered torch operation, so that ``torch.compile`` and autograd go through the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ft_kernels.ops.cross_entropy.reference import Settings

__all__ = ["cross_entropy_backward_op", "cross_entropy_op"]

_SETTINGS = "int ignore_index, float label_smoothing, float softcap, float logit_scale, float z_loss"


def _wide(logits: Tensor) -> torch.dtype:
    from ft_kernels.ops.cross_entropy import kernels

    return kernels.wide_dtype(logits)


@torch.library.custom_op(
    "ft_kernels::cross_entropy",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def cross_entropy_op(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, logsumexp and 1 − p(target), by the kernel."""
    from ft_kernels.ops.cross_entropy import kernels

    settings = Settings(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    return kernels.forward(logits, targets, settings)


@cross_entropy_op.register_fake
def _(logits: Tensor, targets: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses, lses, rests = (logits.new_empty(targets.shape, dtype=_wide(logits)) for _ in range(3))
    return losses, lses, rests


@torch.library.custom_op(
    "ft_kernels::cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor grads, Tensor logits, Tensor targets, Tensor lses, Tensor rests, {_SETTINGS}) -> Tensor",
)
def cross_entropy_backward_op(
    grads: Tensor,
    logits: Tensor,
    targets: Tensor,
    lses: Tensor,
    rests: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> Tensor:
    """The gradient of the logits from the gradient of each row's loss, by the kernel."""
    from ft_kernels.ops.cross_entropy import kernels

    settings = Settings(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    return kernels.backward(grads, logits, targets, lses, rests, settings)


@cross_entropy_backward_op.register_fake
def _(grads: Tensor, logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, *settings = inputs
    ctx.save_for_backward(logits, targets, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.settings = settings


def _backward(ctx: Any, grads: Tensor, _lses: Tensor, _rests: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, lses, rests = ctx.saved_tensors
    dlogits = cross_entropy_backward_op(grads, logits, targets, lses, rests, *ctx.settings)
    return dlogits, None, None, None, None, None, None


cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
