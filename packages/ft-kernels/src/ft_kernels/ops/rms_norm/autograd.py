"""RMS normalization as registered torch operations, so that ``torch.compile`` and autograd go through the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["add_rms_norm_op", "add_rms_norm_out_op", "rms_norm_backward_op", "rms_norm_op", "rms_norm_out_op"]


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

    return kernels.forward(x, weight, eps, offset)[:2]


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_wide(x))


@torch.library.custom_op(
    "ft_kernels::rms_norm_out",
    mutates_args={"out"},
    schema="(Tensor x, Tensor? weight, float eps, float offset, Tensor(a!) out) -> ()",
)
def rms_norm_out_op(x: Tensor, weight: Tensor | None, eps: float, offset: float, out: Tensor) -> None:
    """The normed tensor written to ``out``, of any strides, by the kernel."""
    from ft_kernels.ops.rms_norm import kernels

    kernels.forward(x, weight, eps, offset, out=out)


@rms_norm_out_op.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float, out: Tensor) -> None:
    return None


@torch.library.custom_op(
    "ft_kernels::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
)
def add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed sum, the sum and 1/rms of each of its rows, by the kernel."""
    from ft_kernels.ops.rms_norm import kernels

    y, rstd, total = kernels.forward(x, weight, eps, offset, residual)
    assert total is not None
    return y, total, rstd


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_wide(x))


@torch.library.custom_op(
    "ft_kernels::add_rms_norm_out",
    mutates_args={"out"},
    schema="(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, Tensor(a!) out) -> Tensor",
)
def add_rms_norm_out_op(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, out: Tensor
) -> Tensor:
    """The sum; the normed sum is written to ``out``, of any strides, by the kernel."""
    from ft_kernels.ops.rms_norm import kernels

    total = kernels.forward(x, weight, eps, offset, residual, out)[2]
    assert total is not None
    return total


@add_rms_norm_out_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, out: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "ft_kernels::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, bool need_weight, Tensor? add) "
    "-> (Tensor, Tensor)",
)
def rms_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_weight: bool, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x (with ``add`` added) and of the weight, by the kernel."""
    from ft_kernels.ops.rms_norm import kernels

    return kernels.backward(dy, x, weight, rstd, offset, need_weight, add)


@rms_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_weight: bool, add: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_weight else 0, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.offset = offset


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, rstd = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward_op(dy, x, weight, rstd, ctx.offset, need_weight, None)
    return dx, dweight if need_weight else None, None, None


def _setup_add_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, offset = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # one of the two outputs may be unused: no zeros to read then
    ctx.offset = offset


def _add_backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    if dy is None:
        return dtotal, dtotal, None, None, None
    total, weight, rstd = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[2]
    dx, dweight = rms_norm_backward_op(dy, total, weight, rstd, ctx.offset, need_weight, dtotal)
    return dx, dx, dweight if need_weight else None, None, None


rms_norm_op.register_autograd(_backward, setup_context=_setup_context)
add_rms_norm_op.register_autograd(_add_backward, setup_context=_setup_add_context)
