"""The product of one row with frozen weights in Triton: each weight is read once, several are one launch.

A program takes some outputs and goes along their rows. There is nothing to share but the row, which the caches have, so
all that counts is that enough of the weight is on its way at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, launch, power_of_2
from ft_kernels.ops.lora.tiles import rounded, rounds_by_hand
from ft_kernels.ops.nf4_linear.autograd import MOST_PARTS

__all__ = ["product"]


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def _one_row(
    x, y, weight0, stride0, n0, weight1, stride1, n1, weight2, stride2, n2,
    K: tl.constexpr, PARTS: tl.constexpr, BY_HAND: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    weight, stride, n, column = weight0, stride0, n0, n0 * 0
    if PARTS > 1:
        tiles = tl.cdiv(n0, ROWS)
        if tile >= tiles:
            weight, stride, n, column = weight1, stride1, n1, n0
            tile -= tiles
            if PARTS > 2:
                tiles = tl.cdiv(n1, ROWS)
                if tile >= tiles:
                    weight, stride, n, column = weight2, stride2, n2, n0 + n1
                    tile -= tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    there = rows < n
    cols = tl.arange(0, ACROSS)
    begin = weight + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    acc = tl.zeros((ROWS, ACROSS), tl.float32)
    for start in range(0, K, ACROSS):
        inside = start + cols < K
        values = tl.load(begin + start, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        inputs = tl.load(x + start + cols, mask=inside, other=0.0).to(tl.float32)
        acc += values * inputs[None, :]
    tl.store(y + column + rows, rounded(tl.sum(acc, 1), y, BY_HAND), mask=there)


def product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``[1, sum of N]`` of x ``[1, K]`` and one to three weights ``[N, K]``, all of them fp16 or all bf16."""
    k = x.shape[1]
    sizes = [weight.shape[0] for weight in weights]
    y = dispatch.allocate((1, sum(sizes)), x.dtype, x.device)
    given: list[Any] = []
    for weight in weights:
        given += [weight, weight.stride(0), weight.shape[0]]
    given += given[-3:] * (MOST_PARTS - len(weights))
    settings = tuning.settings(
        "row_linear", x.device, (k, sum(sizes), len(sizes), x.dtype),
        default={"ROWS": 4, "ACROSS": min(1024, power_of_2(k)), "num_warps": 4},
        candidates=[
            {"ROWS": r, "ACROSS": a, "num_warps": w}
            for r, a, w in ((1, 2048, 4), (2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 1024, 8), (8, 512, 4))
        ],
    )  # fmt: skip
    grid = (sum(cdiv(size, settings["ROWS"]) for size in sizes),)
    launch(
        "row_linear", _one_row, grid, x.device, x, y, *given,
        K=k, PARTS=len(weights), BY_HAND=rounds_by_hand(x.dtype), **settings,
    )  # fmt: skip
    return y
