"""RMS normalization in Triton.

With r = 1/sqrt(mean(x²) + eps), x̂ = x·r, s = weight + offset and g = dy·s:

    y = x̂·s        dx = r·(g − x̂·mean(g·x̂))        dweight = Σ_rows dy·x̂

16-bit tensors are computed in fp32. fp32 tensors are computed in fp64, so that their one error is the final rounding;
that costs a few fp64 operations an element in a kernel that waits for memory. Rows of up to ``SHORT`` elements are
computed in fp64 too, because the two terms of dx cancel there (for a row of one element nearly all of it).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.dispatch import Rows, interpreting, launch

__all__ = ["backward", "forward", "wide_dtype"]

SHORT = 32
MAX_BLOCK = 16384
"""The longest row that one program holds whole; a longer one is read twice."""
TILE = 4096
"""Elements that a program works on at a time, where rows are shorter than that."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the saved 1/rms for an input like x."""
    return torch.float64 if x.dtype == torch.float32 or x.shape[-1] <= SHORT else torch.float32


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _scale(weight, cols, mask, offset: tl.constexpr, HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr):
    if HAS_WEIGHT:
        scale = tl.load(weight + cols, mask=mask, other=0.0).to(WIDE) + offset
    else:
        scale = tl.full(cols.shape, 1.0, WIDE)
    return scale


@triton.jit
def _rounded(value, target):
    # By way of fp32: triton's interpreter does not know fp64 to bf16. Twice rounded, a value can be off by 2⁻²⁴ more.
    return value.to(tl.float32).to(target.dtype.element_ty)


@triton.jit
def _forward(
    x, x_inner, x_outer_stride, x_inner_stride, weight, y, rstd, N, H,
    eps: tl.constexpr, offset: tl.constexpr, HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (rows < N)[:, None]
    source = x + ((rows // x_inner) * x_outer_stride + (rows % x_inner) * x_inner_stride)[:, None]
    target = y + (rows * H)[:, None]
    cols = tl.arange(0, BLOCK)
    if WHOLE:
        mask = cols < H
        values = tl.load(source + cols[None, :], mask=there & mask[None, :], other=0.0).to(WIDE)
        r = 1.0 / tl.sqrt(tl.sum(values * values, 1) / H + eps)
        scale = _scale(weight, cols, mask, offset, HAS_WEIGHT, WIDE)
        result = values * r[:, None] * scale[None, :]
        tl.store(target + cols[None, :], _rounded(result, y), mask=there & mask[None, :])
    else:
        squares = tl.zeros((ROWS, BLOCK), WIDE)
        for start in range(0, H, BLOCK):
            mask = start + cols < H
            values = tl.load(source + (start + cols)[None, :], mask=there & mask[None, :], other=0.0).to(WIDE)
            squares += values * values
        r = 1.0 / tl.sqrt(tl.sum(squares, 1) / H + eps)
        for start in range(0, H, BLOCK):
            mask = start + cols < H
            values = tl.load(source + (start + cols)[None, :], mask=there & mask[None, :], other=0.0).to(WIDE)
            scale = _scale(weight, start + cols, mask, offset, HAS_WEIGHT, WIDE)
            result = values * r[:, None] * scale[None, :]
            tl.store(target + (start + cols)[None, :], _rounded(result, y), mask=there & mask[None, :])
    tl.store(rstd + rows, r, mask=rows < N)


@triton.jit
def _backward(
    dy, dy_inner, dy_outer_stride, dy_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, weight, rstd,
    dx, partial, N, H,
    offset: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_WEIGHT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), WIDE)
    for tile in range(pid, tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < N)[:, None]
        x_row = x + ((rows // x_inner) * x_outer_stride + (rows % x_inner) * x_inner_stride)[:, None]
        dy_row = dy + ((rows // dy_inner) * dy_outer_stride + (rows % dy_inner) * dy_inner_stride)[:, None]
        dx_row = dx + (rows * H)[:, None]
        r = tl.load(rstd + rows, mask=rows < N, other=0.0)[:, None]
        if WHOLE:
            mask = there & (cols < H)[None, :]
            up = tl.load(dy_row + cols[None, :], mask=mask, other=0.0).to(WIDE)
            normed = tl.load(x_row + cols[None, :], mask=mask, other=0.0).to(WIDE) * r
            g = up * _scale(weight, cols, cols < H, offset, HAS_WEIGHT, WIDE)[None, :]
            mean = (tl.sum(g * normed, 1) / H)[:, None]
            tl.store(dx_row + cols[None, :], _rounded(r * (g - normed * mean), dx), mask=mask)
            if NEED_WEIGHT:
                total += tl.sum(up * normed, 0)
        else:
            products = tl.zeros((ROWS, BLOCK), WIDE)
            for start in range(0, H, BLOCK):
                here = start + cols
                mask = there & (here < H)[None, :]
                up = tl.load(dy_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                normed = tl.load(x_row + here[None, :], mask=mask, other=0.0).to(WIDE) * r
                products += up * normed * _scale(weight, here, here < H, offset, HAS_WEIGHT, WIDE)[None, :]
            mean = (tl.sum(products, 1) / H)[:, None]
            for start in range(0, H, BLOCK):
                here = start + cols
                mask = there & (here < H)[None, :]
                up = tl.load(dy_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                normed = tl.load(x_row + here[None, :], mask=mask, other=0.0).to(WIDE) * r
                g = up * _scale(weight, here, here < H, offset, HAS_WEIGHT, WIDE)[None, :]
                tl.store(dx_row + here[None, :], _rounded(r * (g - normed * mean), dx), mask=mask)
                if NEED_WEIGHT:
                    # The program's own line of `partial`: nobody else writes it, and its first tile does not read it.
                    slot = partial + tl.cast(pid, tl.int64) * H + here
                    before = tl.load(slot, mask=(here < H) & (tile != pid), other=0.0)
                    tl.store(slot, before + tl.sum(up * normed, 0), mask=here < H)
            if NEED_WEIGHT:
                tl.debug_barrier()  # the next tile may load what another thread stored
    if WHOLE and NEED_WEIGHT:
        tl.store(partial + tl.cast(pid, tl.int64) * H + cols, total, mask=cols < H)


def _tiling(h: int) -> dict[str, int | bool]:
    block = triton.next_power_of_2(max(h, 1))
    whole = block <= MAX_BLOCK
    block = min(block, MAX_BLOCK)
    rows = max(1, TILE // block) if whole else 1
    return {"BLOCK": block, "ROWS": rows, "WHOLE": whole, "num_warps": min(16, max(4, rows * block // 1024))}


def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The normed tensor (contiguous, x's dtype) and 1/rms of each row."""
    wide = wide_dtype(x)
    source = Rows(x)
    y = dispatch.allocate(x.shape, x.dtype, x.device)
    rstd = dispatch.allocate(x.shape[:-1], wide, x.device)
    if y.numel() == 0:
        return y, rstd.zero_()
    tiling = _tiling(x.shape[-1])
    scale = x if weight is None else weight.contiguous()
    launch(
        "rms_norm_forward", _forward, (triton.cdiv(source.count, tiling["ROWS"]),), x.device,
        source.tensor, *source.layout, scale, y, rstd, source.count, x.shape[-1],
        eps=eps, offset=offset, HAS_WEIGHT=weight is not None, WIDE=_triton_dtype(wide), **tiling,
    )  # fmt: skip
    return y, rstd


def _programs(device: torch.device) -> int:
    if interpreting():
        return 3  # few, but enough that each works on several tiles and there are sums to add up
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight (an empty tensor where it is not needed)."""
    h = x.shape[-1]
    dx = dispatch.allocate(x.shape, x.dtype, x.device)
    if dx.numel() == 0:
        return dx, dx.new_zeros(h if need_weight else 0, dtype=dx.dtype if weight is None else weight.dtype)
    up, source, tiling = Rows(dy), Rows(x), _tiling(h)
    programs = min(_programs(x.device), triton.cdiv(source.count, tiling["ROWS"]))
    partial = dispatch.allocate((programs, h) if need_weight else (0,), rstd.dtype, x.device)
    scale = x if weight is None else weight.contiguous()
    launch(
        "rms_norm_backward", _backward, (programs,), x.device,
        up.tensor, *up.layout, source.tensor, *source.layout, scale, rstd, dx, partial, source.count, h,
        offset=offset, HAS_WEIGHT=weight is not None, NEED_WEIGHT=need_weight, WIDE=_triton_dtype(rstd.dtype), **tiling,
    )  # fmt: skip
    dweight = partial.sum(0) if need_weight else partial
    return dx, dweight.to(x.dtype if weight is None else weight.dtype)
