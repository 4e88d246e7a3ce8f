"""Quantization to e4m3fn in Triton: scale = largest magnitude · (1/448), number = round(x · (1/scale)), all in fp32.

Cards without fp8 instructions (before compute capability 8.9) and the interpreter put the bits of a number together by
integer arithmetic, with the same result. A magnitude's bits are compared as an integer, because then nan counts as the
largest and comes out as the scale.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import tuning
from ft_kernels.dispatch import Rows, cdiv, interpreting, launch, power_of_2

__all__ = ["quantize"]

MAX_BLOCK = 16384
"""The longest row that one program holds whole; a longer one is read twice."""
TILE = 4096
"""Values that a program works on, where rows are shorter than that."""


@triton.jit
def _magnitude(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_and_inverse(magnitude):
    exact = magnitude.to(tl.float32, bitcast=True) * (1.0 / 448)
    scale = tl.where(exact < 1.1754943508222875e-38, 1.1754943508222875e-38, exact)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _number(x, inverse, FP8: tl.constexpr):
    """The byte of the e4m3fn number nearest to x·inverse, to even where two are equally near; nan stays nan."""
    value = x.to(tl.float32) * inverse
    value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))
    if FP8:
        byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Under 2⁻⁶ numbers are multiples of 2⁻⁹, which is the last place of fp32 numbers from 2¹⁴ on.
        small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        number = tl.where(magnitude < 0x3C800000, small, normal)
        number = tl.where(magnitude > 0x7F800000, 0x7F, number)
        byte = (number | ((bits >> 24) & 0x80)).to(tl.uint8)
    return byte


@triton.jit
def _starts(rows, inner, outer_stride, inner_stride, SPLIT: tl.constexpr):
    starts = rows * inner_stride
    if SPLIT:  # a 64-bit division: only where rows have two strides
        starts += (rows // inner) * (outer_stride - inner * inner_stride)
    return starts[:, None]


@triton.jit
def _rows(
    x, inner, outer_stride, inner_stride, out, scales, N, K,
    FP8: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < N)[:, None]
    source = x + _starts(row, inner, outer_stride, inner_stride, SPLIT)
    target = out + (row * K)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        values = tl.load(source + cols, mask=there & (cols < K), other=0.0)
        scale, inverse = _scale_and_inverse(tl.max(_magnitude(values), 1))
        tl.store(target + cols, _number(values, inverse[:, None], FP8), mask=there & (cols < K))
    else:
        largest = tl.zeros((ROWS, BLOCK), tl.int32)
        for start in range(0, K, BLOCK):
            values = tl.load(source + start + cols, mask=there & (start + cols < K), other=0.0)
            largest = tl.maximum(largest, _magnitude(values))
        scale, inverse = _scale_and_inverse(tl.max(largest, 1))
        for start in range(0, K, BLOCK):
            mask = there & (start + cols < K)
            values = tl.load(source + start + cols, mask=mask, other=0.0)
            tl.store(target + start + cols, _number(values, inverse[:, None], FP8), mask=mask)
    tl.store(scales + row, scale, mask=row < N)


@triton.jit
def _groups(
    x, inner, outer_stride, inner_stride, out, scales, N, K,
    FP8: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """ROWS rows by GROUPS groups of 128; the scales of a group lie side by side."""
    across = tl.cdiv(K, GROUPS * 128)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) % across) * GROUPS
    cols = (first * 128 + tl.arange(0, GROUPS * 128))[None, :]
    mask = (row < N)[:, None] & (cols < K)
    source = x + _starts(row, inner, outer_stride, inner_stride, SPLIT)
    values = tl.load(source + cols, mask=mask, other=0.0)
    grouped = tl.reshape(values, [ROWS, GROUPS, 128])
    scale, inverse = _scale_and_inverse(tl.max(_magnitude(grouped), 2))
    numbers = tl.reshape(_number(grouped, inverse[:, :, None], FP8), [ROWS, GROUPS * 128])
    tl.store(out + (row * K)[:, None] + cols, numbers, mask=mask)
    group = (first + tl.arange(0, GROUPS))[None, :]
    tl.store(scales + group * tl.cast(N, tl.int64) + row[:, None], scale, mask=(row < N)[:, None] & (group * 128 < K))


@triton.jit
def _blocks(x, row_stride, column_stride, out, scales, scales_stride, N, K, FP8: tl.constexpr):
    across = tl.cdiv(K, 128)
    down = tl.program_id(0) // across
    right = tl.program_id(0) % across
    row = (down.to(tl.int64) * 128 + tl.arange(0, 128))[:, None]
    col = (right.to(tl.int64) * 128 + tl.arange(0, 128))[None, :]
    mask = (row < N) & (col < K)
    values = tl.load(x + row * row_stride + col * column_stride, mask=mask, other=0.0)
    scale, inverse = _scale_and_inverse(tl.max(tl.max(_magnitude(values), 1), 0))
    tl.store(out + row * K + col, _number(values, inverse, FP8), mask=mask)
    tl.store(scales + down * scales_stride + right, scale)


@cache
def _row_tiling(width: int) -> dict[str, Any]:
    block = power_of_2(width)
    whole = block <= MAX_BLOCK
    block = min(block, MAX_BLOCK // (1 if whole else 4))
    rows = max(1, TILE // block)
    return {"BLOCK": block, "ROWS": rows, "WHOLE": whole, "num_warps": min(16, max(4, rows * block // 1024))}


@cache
def _group_tiling(tile: int = TILE) -> dict[str, Any]:
    return {"GROUPS": 2, "ROWS": tile // 256, "num_warps": tile // 512}


@cache
def _row_candidates(width: int) -> list[dict[str, Any]]:
    return [_row_tiling(width) | {"num_warps": w} for w in (4, 8, 16)]


@cache
def _group_candidates() -> list[dict[str, Any]]:
    return [_group_tiling(tile) | {"num_warps": w} for tile in (2048, 4096, 8192) for w in (4, 8)]


def quantize(x: Tensor, scaling: int, out: Tensor, scale: Tensor) -> None:
    """Write the numbers of x, of any strides, to ``out``, contiguous, and the scales to ``scale`` of ``scale_like``."""
    if out.numel() == 0:
        scale.fill_(2.0**-126)
        return
    width, device = x.shape[-1], x.device
    constants = {"FP8": not interpreting() and tuning.capability(device) >= (8, 9)}
    numbers = out.view(torch.uint8)
    if scaling == 2:
        grid = (cdiv(x.shape[0], 128) * cdiv(width, 128),)
        launch(
            "fp8_quantize_blocks", _blocks, grid, device,
            x, *x.stride(), numbers, scale, scale.stride(0), x.shape[0], width,
            **constants, num_warps=16 if x.stride(1) == 1 else 32,
        )  # fmt: skip
        return
    rows = Rows(x)
    constants["SPLIT"] = rows.layout[0] != rows.count
    arguments = (rows.tensor, *rows.layout, numbers, scale, rows.count, width)
    if scaling == 0:
        settings = tuning.settings(
            "fp8_quantize_rows", device, (width, x.dtype),
            default=_row_tiling(width), candidates=_row_candidates(width),
        )  # fmt: skip
        grid = (cdiv(rows.count, settings["ROWS"]),)
        launch("fp8_quantize_rows", _rows, grid, device, *arguments, **constants, **settings)
        return
    settings = tuning.settings(
        "fp8_quantize_groups", device, (width, x.dtype), default=_group_tiling(), candidates=_group_candidates()
    )  # fmt: skip
    grid = (cdiv(rows.count, settings["ROWS"]) * cdiv(width, settings["GROUPS"] * 128),)
    launch("fp8_quantize_groups", _groups, grid, device, *arguments, **constants, **settings)
