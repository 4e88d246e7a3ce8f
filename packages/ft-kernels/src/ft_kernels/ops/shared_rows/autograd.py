"""Sums of rows, with gradients that are sums of rows too: no atomic additions, so that they are the same each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.shared_rows import reference

__all__ = ["SumRows", "sum_rows"]


def sum_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """For each row of ``index`` the sum of the rows of x that it names; without a graph.

    Args:
        x: ``[N, ...]``, floating point; at least one row. index: int32 ``[M, C]``, numbers of rows, or -1 for none.
        out: ``[M, ...]``, contiguous, where to write the result, or None.

    Returns:
        ``[M, ...]`` in x's dtype, contiguous; added up in float32, or in float64 where x has that.
    """
    if use_triton(x) and not torch.compiler.is_compiling():
        from ft_kernels.ops.shared_rows import kernels

        return kernels.sum_rows(x, index, out)
    made = reference.sum_rows(x, index)
    return made if out is None else out.copy_(made)


class SumRows(torch.autograd.Function):
    """:func:`sum_rows` with a gradient: ``back`` names, for each row of x, the rows of the result that it is in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return sum_rows(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return sum_rows(grad, back), None, None
