"""bitsandbytes' 8-bit weights in Triton: two fp32 products in bitsandbytes' order, rounded to the result's dtype."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import Rows, cdiv, launch, native, power_of_2
from ft_kernels.ops.nf4.kernels import rounded

__all__ = ["dequantize"]

TILE = 4096
"""Values that a program works on."""


@triton.jit
def _dequantize(
    quantized, inner, outer_stride, inner_stride, scales, out, out_inner, out_outer_stride, out_inner_stride, N, K,
    SPLIT: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(K, BLOCK)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # The hint keeps a thread from loading more than the 8 values that it can store at once.
    cols = tl.max_contiguous((tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK), 8)[None, :]
    mask = (rows < N)[:, None] & (cols < K)
    source = rows * inner_stride
    target = rows * out_inner_stride
    if SPLIT:  # 64-bit divisions: only where rows have two strides
        source += (rows // inner) * (outer_stride - inner * inner_stride)
        target += (rows // out_inner) * (out_outer_stride - out_inner * out_inner_stride)
    number = tl.load(quantized + source[:, None] + cols, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scales + rows, mask=rows < N, other=0.0)[:, None]
    value = number * scale * 7.874015718698502e-3
    tl.store(out + target[:, None] + cols, rounded(value, out.dtype.element_ty, NATIVE), mask=mask)


@cache
def _tiling(width: int, tile: int = TILE) -> dict[str, Any]:
    """A tile of whole or part rows; the widest block that wastes little on the last one of a row."""
    block = min(power_of_2(max(width, 1)), tile)
    while block > 512 and cdiv(width, block) * block > width * 1.05:
        block //= 2
    return {"BLOCK": block, "ROWS": max(1, tile // block), "num_warps": max(1, tile // 512)}


@cache
def _candidates(width: int) -> list[dict[str, Any]]:
    return [_tiling(width, tile) | {"num_warps": w} for tile in (2048, 4096, 8192) for w in (4, 8, 16)]


def dequantize(quantized: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """The values, written to ``out``, ``[..., K]`` of any strides, from int8 numbers and an fp32 scale for each row."""
    if out.numel() == 0:
        return out
    source, target = Rows(quantized), Rows(out)
    if target.tensor is not out:
        target = Rows(dispatch.allocate(out.shape, out.dtype, out.device))
    width = out.shape[-1]
    settings = tuning.settings(
        "int8_dequantize", out.device, (width, out.dtype), default=_tiling(width), candidates=_candidates(width)
    )  # fmt: skip
    grid = (cdiv(source.count, settings["ROWS"]) * cdiv(width, settings["BLOCK"]),)
    launch(
        "int8_dequantize", _dequantize, grid, out.device,
        source.tensor, *source.layout, scales.contiguous(), target.tensor, *target.layout, source.count, width,
        SPLIT=any(r.layout[0] != r.count for r in (source, target)), NATIVE=native(), **settings,
    )  # fmt: skip
    if target.tensor is not out:
        out.copy_(target.tensor)
    return out
