"""Products with low-rank updates as registered torch operations, for autograd and ``torch.compile``.

One operation is the whole product: what surrounds the matrix product uses memory beside the weight as scratch (the last
columns of a wide weight, refreshed at each use), which no other operation ever sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ft_kernels.ops.lora import products
from ft_kernels.ops.lora.operands import Base, Drop, Low, padded
from ft_kernels.ops.row_norms.norms import row_norms

__all__ = ["as_rows", "lora_linear_backward_op", "lora_linear_op", "lora_row_norms_op", "no_gradient", "unflatten"]

BASE = "Tensor[] weight, str kind, int k, int[] sizes, int[] meta"
LOW = "Tensor[] a, Tensor[] b, int[] starts, float[] scaling"


def as_rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]`` with the last dimension contiguous, without a copy where that can be."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def unflatten(
    flat: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], need_a: Sequence[bool], need_b: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Each adapter's gradients as views of the flat tensor."""
    parts = [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in (*a, *b)]), (*a, *b), strict=True)]
    wanted = [part if need else None for part, need in zip(parts, (*need_a, *need_b), strict=True)]
    return wanted[: len(a)], wanted[len(a) :]


def no_gradient(numbers: Sequence[float]) -> list[Tensor] | None:
    """What a backward returns for a list of numbers; torch takes an empty one for a list of tensors."""
    return None if numbers else []


@torch.library.custom_op(
    "ft_kernels::lora_linear",
    mutates_args=(),
    schema=f"(Tensor x, {BASE}, {LOW}, Tensor? bias, float dropout, Tensor? seed) -> (Tensor, Tensor)",
)
def lora_linear_op(
    x: Tensor,
    weight: Sequence[Tensor],
    kind: str,
    k: int,
    sizes: Sequence[int],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    scaling: Sequence[float],
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The product ``[..., N]`` and what the first adapter matrices make of its input, ``[M, R]``."""
    base, low = Base(kind, weight, k, sizes, meta), Low(a, b, starts, scaling)
    with torch.autocast(x.device.type, enabled=False):
        y, tail = products.forward(as_rows(x), base, low, bias, Drop(dropout, seed))
    return y.view(*x.shape[:-1], base.n), tail


@lora_linear_op.register_fake
def _(
    x: Tensor,
    weight: Sequence[Tensor],
    kind: str,
    k: int,
    sizes: Sequence[int],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *others: Any,
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.new_empty(*x.shape[:-1], sum(sizes)), x.new_empty(rows, padded(sum(t.shape[0] for t in a)))


@torch.library.custom_op(
    "ft_kernels::lora_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor tail, {BASE}, {LOW}, float dropout, Tensor? seed, "
    "bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor)",
)
def lora_linear_backward_op(
    dy: Tensor,
    x: Tensor,
    tail: Tensor,
    weight: Sequence[Tensor],
    kind: str,
    k: int,
    sizes: Sequence[int],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    scaling: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x and all adapters' in one; empty where not needed.

    That of x lies without gaps: cuDNN's attention reads the gradient of its output as if it did, whatever its strides
    (torch 2.11), and this may be it.
    """
    base, low, drop = Base(kind, weight, k, sizes, meta), Low(a, b, starts, scaling), Drop(dropout, seed)
    needs: dict[str, Any] = {"need_x": need_x, "need_a": need_a, "need_b": need_b}
    with torch.autocast(x.device.type, enabled=False):
        dx, flat = products.backward(as_rows(dy), as_rows(x), tail, base, low, drop, dense=True, **needs)
    dx = x.new_empty(0) if dx is None else dx.view(*x.shape[:-1], k)
    return dx, x.new_empty(0) if flat is None else flat


@lora_linear_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    tail: Tensor,
    weight: Sequence[Tensor],
    kind: str,
    k: int,
    sizes: Sequence[int],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    scaling: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(*x.shape[:-1], k) if need_x else x.new_empty(0)
    if a and (need_a or need_b):
        return dx, a[0].new_empty(sum(t.numel() for t in (*a, *b)))
    return dx, x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, kind, k, sizes, meta, a, b, starts, scaling, bias, dropout, seed = inputs
    # The frozen weight is no activation: it is not saved as one, so that hooks that offload or recompute leave it be.
    ctx.base = (weight, kind, k, sizes, meta)
    ctx.save_for_backward(x, output[1], seed, *a, *b)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.settings = (starts, scaling, dropout)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, tail, seed, *adapters = ctx.saved_tensors
    starts, scaling, dropout = ctx.settings
    a, b = adapters[: len(starts)], adapters[len(starts) :]
    need_x, _, _, _, _, _, need_a, need_b, _, _, need_bias, _, _ = ctx.needs_input_grad
    dx, flat = lora_linear_backward_op(
        dy, x, tail, *ctx.base, a, b, starts, scaling, dropout, seed, need_x, any(need_a), any(need_b)
    )
    da, db = ([None] * len(a), [None] * len(b)) if not flat.numel() else unflatten(flat, a, b, need_a, need_b)
    dbias = as_rows(dy).sum(0).to(ctx.bias_dtype) if need_bias else None
    weight, _, _, sizes, meta = ctx.base
    return (
        dx if need_x else None, [None] * len(weight), None, None, no_gradient(sizes), no_gradient(meta), da, db,
        no_gradient(starts), no_gradient(scaling), dbias, None, None,
    )  # fmt: skip


lora_linear_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "ft_kernels::lora_row_norms",
    mutates_args=(),
    schema=f"({BASE}, {LOW}, ScalarType dtype) -> Tensor",
)
def lora_row_norms_op(
    weight: Sequence[Tensor],
    kind: str,
    k: int,
    sizes: Sequence[int],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    scaling: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The norm of each row of the weight with its updates, ``[N]``, in fp32 (float64 for float64)."""
    with torch.autocast(weight[0].device.type, enabled=False):
        return row_norms(Base(kind, weight, k, sizes, meta), Low(a, b, starts, scaling), dtype)


@lora_row_norms_op.register_fake
def _(weight: Sequence[Tensor], kind: str, k: int, sizes: Sequence[int], *others: Any) -> Tensor:
    return weight[0].new_empty(sum(sizes), dtype=torch.promote_types(others[-1], torch.float32))
