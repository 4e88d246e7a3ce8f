"""Layer normalization as registered torch operations, so that ``torch.compile`` and autograd go through the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["layer_norm_backward_op", "layer_norm_op", "layer_norm_out_op"]


def _wide(x: Tensor) -> torch.dtype:
    from ft_kernels.ops.layer_norm import kernels

    return kernels.wide_dtype(x)


@torch.library.custom_op(
    "ft_kernels::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def layer_norm_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed tensor, and the mean and 1/deviation of each row, by the kernel."""
    from ft_kernels.ops.layer_norm import kernels

    return kernels.forward(x, weight, bias, eps)


@layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=_wide(x)), x.new_empty(rows, dtype=_wide(x))


@torch.library.custom_op(
    "ft_kernels::layer_norm_out",
    mutates_args={"out"},
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out) -> ()",
)
def layer_norm_out_op(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    """The normed tensor written to ``out``, of any strides, by the kernel."""
    from ft_kernels.ops.layer_norm import kernels

    kernels.forward(x, weight, bias, eps, out)


@layer_norm_out_op.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor) -> None:
    return None


@torch.library.custom_op(
    "ft_kernels::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)",
)
def layer_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, by the kernel."""
    from ft_kernels.ops.layer_norm import kernels

    return kernels.backward(dy, x, weight, bias, mean, rstd, need_weight, need_bias)


@layer_norm_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (
        x.new_empty(x.shape[-1] if need else 0, dtype=x.dtype if parameter is None else parameter.dtype)
        for need, parameter in ((need_weight, weight), (need_bias, bias))
    )
    return x.new_empty(x.shape), dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody


def _backward(
    ctx: Any, dy: Tensor, _mean: Tensor, _rstd: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    _, need_weight, need_bias, _ = ctx.needs_input_grad
    dx, dweight, dbias = layer_norm_backward_op(dy, x, weight, bias, mean, rstd, need_weight, need_bias)
    return dx, dweight if need_weight else None, dbias if need_bias else None, None


layer_norm_op.register_autograd(_backward, setup_context=_setup_context)
