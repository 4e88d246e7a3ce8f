"""Rows times a factor known only on the device, in Triton; what is done with logits is in ``ops/cross_entropy``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.dispatch import cdiv, launch, power_of_2
from ft_kernels.ops.row_softmax.kernels import narrowed

__all__ = ["scaled_into"]

MAX_BLOCK = 4096


@triton.jit
def _scaled(x, factor, factor_stride, out, N, total, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.load(factor + row * factor_stride).to(tl.float32)
    if IN_PLACE:  # noqa: SIM102 - the first is known at compile time
        if f == 1.0:
            return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * N + cols
    there = (cols < N) & (at < total)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    # A row without a target has a gradient of zero also where the mean over no rows made the factor infinite.
    value = tl.where(value == 0.0, 0.0, value * f)
    tl.store(out + at, narrowed(value, out), mask=there)


def scaled_into(x: Tensor, factor: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``x``, contiguous, times one factor, or one for each row of ``[R, C]``; into ``out``, contiguous, if given.

    Written over x itself, nothing is done where the factor is 1.
    """
    result = dispatch.allocate(x.shape, dtype, x.device) if out is None else out
    if x.numel():
        width = x.shape[-1] if factor.dim() else min(MAX_BLOCK, x.numel())
        block = min(power_of_2(width), MAX_BLOCK)
        launch(
            "linear_head_scaled", _scaled, (cdiv(x.numel(), width), cdiv(width, block)), x.device,
            x, factor, factor.stride(0) if factor.dim() else 0, result, width, x.numel(),
            IN_PLACE=out is x, BLOCK=block, num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
    return result
