"""Gated linear units as registered torch operations, so that ``torch.compile`` and autograd go through the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.glu.reference import halves

__all__ = ["glu_backward_op", "glu_op", "glu_out_op"]


@torch.library.custom_op("ft_kernels::glu", mutates_args=(), schema="(Tensor gate, Tensor? up, int kind) -> Tensor")
def glu_op(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    """activation(gate)·up, by the kernel."""
    from ft_kernels.ops.glu import kernels

    return kernels.forward(gate, up, kind)


@glu_op.register_fake
def _(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    return gate.new_empty(halves(gate, up)[0].shape)


@torch.library.custom_op(
    "ft_kernels::glu_out", mutates_args={"out"}, schema="(Tensor gate, Tensor? up, int kind, Tensor(a!) out) -> ()"
)
def glu_out_op(gate: Tensor, up: Tensor | None, kind: int, out: Tensor) -> None:
    """activation(gate)·up written to ``out``, of any strides, by the kernel."""
    from ft_kernels.ops.glu import kernels

    kernels.forward(gate, up, kind, out)


@glu_out_op.register_fake
def _(gate: Tensor, up: Tensor | None, kind: int, out: Tensor) -> None:
    return None


@torch.library.custom_op(
    "ft_kernels::glu_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor gate, Tensor? up, int kind) -> (Tensor, Tensor)",
)
def glu_backward_op(dh: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, by the kernel; for a packed gate its whole gradient, and an empty tensor."""
    from ft_kernels.ops.glu import kernels

    if up is not None:
        return kernels.backward(dh, gate, up, kind)
    whole = dispatch.allocate(gate.shape, gate.dtype, gate.device)
    dgate, dup = halves(whole, None)
    kernels.backward(dh, gate, up, kind, dgate=dgate, dup=dup)
    return whole, gate.new_empty(0)


@glu_backward_op.register_fake
def _(dh: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = glu_backward_op(dh, gate, up, ctx.kind)
    return dgate, None if up is None else dup, None


glu_op.register_autograd(_backward, setup_context=_setup_context)
