"""The norm of each row of W + S·A in Triton, in one pass over W: the sum exists in registers only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.dispatch import cdiv, interpreting, launch
from ft_kernels.ops.lora.tiles import loads_ahead, operand, ranks_block

__all__ = ["row_norms"]


@triton.jit
def _row_norms(
    weight, weight_stride, columns, column_stride, packed, norms, N, K, R,
    BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, RP)
    there = (rows < N)[:, None]
    beside = columns + rows[:, None] * column_stride + ranks[None, :]
    up = operand(tl.load(beside, mask=there & (ranks < R)[None, :], other=0.0), INTERPRETED)
    squares = tl.zeros((BN, BK), tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        here = weight + rows[:, None] * weight_stride + cols[None, :]
        base = tl.load(here, mask=there & (cols < K)[None, :], other=0.0)
        inside = (ranks < R)[:, None] & (cols < K)[None, :]
        low = tl.load(packed + ranks[:, None] * K + cols[None, :], mask=inside, other=0.0)
        value = tl.dot(up, operand(low, INTERPRETED), base.to(tl.float32))
        squares += value * value
    tl.store(norms + rows, tl.sqrt(tl.sum(squares, 1)), mask=rows < N)


def row_norms(weight: Tensor, columns: Tensor, packed: Tensor) -> Tensor:
    """``‖W + S A‖`` of each row in fp32."""
    n, k = weight.shape
    r, device = packed.shape[0], weight.device
    norms = dispatch.allocate((n,), torch.float32, device)
    tile = 16
    launch(
        "lora_row_norms", _row_norms, (cdiv(n, tile),), device,
        weight, weight.stride(0), columns, columns.stride(0), packed, norms, n, k, r,
        BN=tile, BK=128, RP=ranks_block(r), INTERPRETED=interpreting(),
        num_warps=4, num_stages=loads_ahead(96 * 256, 4, device),
    )  # fmt: skip
    return norms
