"""Sums of rows in Triton: a program for each row of the result, which reads what it is the sum of."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.dispatch import cdiv, launch, power_of_2
from ft_kernels.ops.lora.tiles import rounded, rounds_by_hand

__all__ = ["sum_rows"]

WIDEST = 4096
"""Numbers of a row that a program takes."""


@triton.jit(do_not_specialize=["count"])  # it changes from batch to batch: one kernel for all
def _sum_rows(x, index, out, stride, W, count, BLOCK: tl.constexpr, BY_HAND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < W
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(count):
        place = tl.load(index + row * count + i).to(tl.int64)
        total += tl.load(x + place * stride + cols, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * W + cols, rounded(total, out, BY_HAND), mask=inside)


def sum_rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """See :func:`ft_kernels.ops.shared_rows.autograd.sum_rows`."""
    rows = x.flatten(1)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    height, width = index.shape[0], rows.shape[1]
    if out is None:
        out = dispatch.allocate((height, *x.shape[1:]), x.dtype, x.device)
    if out.numel():
        block = min(power_of_2(width), WIDEST)
        launch(
            "shared_rows", _sum_rows, (height, cdiv(width, block)), x.device, rows, index, out, rows.stride(0), width,
            index.shape[1], BLOCK=block, BY_HAND=rounds_by_hand(x.dtype), num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return out


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """See :func:`ft_kernels.gather_rows`: sums of one row each."""
    if table.stride(1) != 1:
        table = table.contiguous()
    count, width = index.shape[0], table.shape[1]
    out = dispatch.allocate((count, width), table.dtype, index.device)
    if out.numel():
        block = min(power_of_2(width), WIDEST)
        launch(
            "gather_rows", _sum_rows, (count, cdiv(width, block)), index.device, table, index, out, table.stride(0),
            width, 1, BLOCK=block, BY_HAND=rounds_by_hand(table.dtype), num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return out
