"""RMS normalization as a registered torch operation, so that ``torch.compile`` and autograd go through the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rms_norm_backward_op", "rms_norm_op"]


def _wide(x: Tensor) -> torch.dtype:
    from ft_kernels.ops.rms_norm import kernels

    return kernels.wide_dtype(x)


@torch.library.custom_op(
    "ft_kernels::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
)
def rms_norm_op(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The normed tensor and 1/rms of each row, by the kernel."""
    from ft_kernels.ops.rms_norm import kernels

    return kernels.forward(x, weight, eps, offset)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_wide(x))


@torch.library.custom_op(
    "ft_kernels::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, bool need_weight) -> (Tensor, Tensor)",
)
def rms_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight, by the kernel."""
    from ft_kernels.ops.rms_norm import kernels

    return kernels.backward(dy, x, weight, rstd, offset, need_weight)


@rms_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_weight else 0, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.offset = offset


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, rstd = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward_op(dy, x, weight, rstd, ctx.offset, need_weight)
    return dx, dweight if need_weight else None, None, None


rms_norm_op.register_autograd(_backward, setup_context=_setup_context)
