"""RMS normalization in Triton.

With r = 1/sqrt(mean(x²) + eps), x̂ = x·r, s = weight + offset and g = dy·s:

    y = x̂·s        dx = r·(g − x̂·mean(g·x̂))        dweight = Σ_rows dy·x̂

The fused residual add normalizes x + residual, rounded to their dtype; its backward adds that sum's gradient to dx.

16-bit tensors are computed in fp32. fp32 tensors are computed in fp64, so that their one error is the final rounding;
that costs a few fp64 operations an element in a kernel that waits for memory. Rows of up to ``SHORT`` elements are
computed in fp64 too, because the two terms of dx cancel there (for a row of one element nearly all of it).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import Rows, cdiv, interpreting, launch
from ft_kernels.ops.rms_norm.tilings import backward_candidates, backward_tiling, forward_tiling, sharing_programs

__all__ = [
    "backward",
    "column_sums",
    "forward",
    "rounded",
    "row_start",
    "triton_dtype",
    "two_floats",
    "wide_dtype",
    "writable_rows",
]

SHORT = 32


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the saved 1/rms for an input like x."""
    return torch.float64 if x.dtype == torch.float32 or x.shape[-1] <= SHORT else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """What Triton calls the dtype of the arithmetic."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@functools.cache
def two_floats(value: float) -> tuple[float, float]:
    """The value as a sum of two fp32 numbers: Triton passes a Python float as fp32, too coarse for fp64 arithmetic."""
    high: float = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@triton.jit
def row_start(base, rows, inner, outer_stride, inner_stride):
    return base + ((rows // inner) * outer_stride + (rows % inner) * inner_stride)[:, None]


@triton.jit
def _scale(weight, cols, mask, offset, offset_rest, HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr):
    if HAS_WEIGHT:
        scale = tl.load(weight + cols, mask=mask, other=0.0).to(WIDE) + offset + offset_rest
    else:
        scale = tl.full(cols.shape, 1.0, WIDE)
    return scale


@triton.jit
def rounded(value, target):
    # By way of fp32: triton's interpreter does not know fp64 to bf16. Twice rounded, a value can be off by 2⁻²⁴ more.
    return value.to(tl.float32).to(target.dtype.element_ty)


@triton.jit
def _input(source, other, total, mask, ADD: tl.constexpr, COPY: tl.constexpr):
    """The elements to normalize: what is there (copied, if wanted), or the sum of two (stored too), rounded once as
    torch rounds it."""
    values = tl.load(source, mask=mask, other=0.0)
    if ADD:
        values = values.to(tl.float32) + tl.load(other, mask=mask, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
    if ADD or COPY:
        tl.store(total, values, mask=mask)
    return values


@triton.jit
def _forward(
    x, x_inner, x_outer_stride, x_inner_stride, residual, residual_inner, residual_outer_stride, residual_inner_stride,
    weight, y, y_inner, y_outer_stride, y_inner_stride, total, rstd, N, H, eps, eps_rest, offset, offset_rest,
    ADD: tl.constexpr, COPY: tl.constexpr, HAS_WEIGHT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (rows < N)[:, None]
    source = row_start(x, rows, x_inner, x_outer_stride, x_inner_stride)
    other = row_start(residual, rows, residual_inner, residual_outer_stride, residual_inner_stride)
    target = row_start(y, rows, y_inner, y_outer_stride, y_inner_stride)
    sums = total + (rows * H)[:, None]
    cols = tl.arange(0, BLOCK)
    if WHOLE:
        mask = cols < H
        here, both = cols[None, :], there & mask[None, :]
        values = _input(source + here, other + here, sums + here, both, ADD, COPY).to(WIDE)
        if HOIST:  # so that it comes while the row is being added up
            scale = _scale(weight, cols, mask, offset, offset_rest, HAS_WEIGHT, WIDE)
        r = 1.0 / tl.sqrt(tl.sum(values * values, 1) / H + eps + eps_rest)
        if not HOIST:
            scale = _scale(weight, cols, mask, offset, offset_rest, HAS_WEIGHT, WIDE)
        tl.store(target + here, rounded(values * r[:, None] * scale[None, :], y), mask=both)
    else:
        squares = tl.zeros((ROWS, BLOCK), WIDE)
        for start in range(0, H, BLOCK):
            here = (start + cols)[None, :]
            values = _input(source + here, other + here, sums + here, there & (here < H), ADD, COPY).to(WIDE)
            squares += values * values
        r = 1.0 / tl.sqrt(tl.sum(squares, 1) / H + eps + eps_rest)
        if ADD:
            tl.debug_barrier()  # the sums are read back, perhaps by another thread
        for start in range(0, H, BLOCK):
            here = (start + cols)[None, :]
            both = there & (here < H)
            if ADD:
                values = tl.load(sums + here, mask=both, other=0.0).to(WIDE)
            else:
                values = tl.load(source + here, mask=both, other=0.0).to(WIDE)
            scale = _scale(weight, start + cols, start + cols < H, offset, offset_rest, HAS_WEIGHT, WIDE)
            tl.store(target + here, rounded(values * r[:, None] * scale[None, :], y), mask=both)
    tl.store(rstd + rows, r, mask=rows < N)


@triton.jit
def _backward(
    dy, dy_inner, dy_outer_stride, dy_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, weight, rstd,
    more, more_inner, more_outer_stride, more_inner_stride, dx, dx_inner, dx_outer_stride, dx_inner_stride,
    partial, N, H, offset, offset_rest,
    ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEED_WEIGHT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, HOIST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    if WHOLE and HOIST:
        scale = _scale(weight, cols, cols < H, offset, offset_rest, HAS_WEIGHT, WIDE)[None, :]
    if WHOLE and NEED_WEIGHT:
        total = tl.zeros((ROWS, BLOCK), WIDE)
    # Without a weight gradient there are as many programs as tiles, and this runs once. With one, the loads of the
    # next tiles are on their way (STAGES) while this one is worked on.
    for tile in tl.range(pid, tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < N)[:, None]
        x_row = row_start(x, rows, x_inner, x_outer_stride, x_inner_stride)
        dy_row = row_start(dy, rows, dy_inner, dy_outer_stride, dy_inner_stride)
        more_row = row_start(more, rows, more_inner, more_outer_stride, more_inner_stride)
        dx_row = row_start(dx, rows, dx_inner, dx_outer_stride, dx_inner_stride)
        r = tl.load(rstd + rows, mask=rows < N, other=0.0)[:, None]
        if WHOLE:
            here = cols[None, :]
            mask = there & (here < H)
            up = tl.load(dy_row + here, mask=mask, other=0.0).to(WIDE)
            normed = tl.load(x_row + here, mask=mask, other=0.0).to(WIDE)
            if ADD:
                before = tl.load(more_row + here, mask=mask, other=0.0)
            normed *= r
            if not HOIST:
                scale = _scale(weight, cols, cols < H, offset, offset_rest, HAS_WEIGHT, WIDE)[None, :]
            g = up * scale
            mean = (tl.sum(g * normed, 1) / H)[:, None]
            result = r * (g - normed * mean)
            if ADD:
                result += before.to(WIDE)
            tl.store(dx_row + here, rounded(result, dx), mask=mask)
            if NEED_WEIGHT:
                total += up * normed
        else:
            products = tl.zeros((ROWS, BLOCK), WIDE)
            for start in range(0, H, BLOCK):
                here = start + cols
                mask = there & (here < H)[None, :]
                up = tl.load(dy_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                normed = tl.load(x_row + here[None, :], mask=mask, other=0.0).to(WIDE) * r
                products += up * normed * _scale(weight, here, here < H, offset, offset_rest, HAS_WEIGHT, WIDE)[None, :]
            mean = (tl.sum(products, 1) / H)[:, None]
            for start in range(0, H, BLOCK):
                here = start + cols
                mask = there & (here < H)[None, :]
                up = tl.load(dy_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                normed = tl.load(x_row + here[None, :], mask=mask, other=0.0).to(WIDE) * r
                g = up * _scale(weight, here, here < H, offset, offset_rest, HAS_WEIGHT, WIDE)[None, :]
                result = r * (g - normed * mean)
                if ADD:
                    result += tl.load(more_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                tl.store(dx_row + here[None, :], rounded(result, dx), mask=mask)
                if NEED_WEIGHT:
                    # The program's own line of `partial`: nobody else writes it, and its first tile does not read it.
                    slot = partial + tl.cast(pid, tl.int64) * H + here
                    before = tl.load(slot, mask=(here < H) & (tile != pid), other=0.0)
                    tl.store(slot, before + tl.sum(up * normed, 0), mask=here < H)
            if NEED_WEIGHT:
                tl.debug_barrier()  # the next tile may load what another thread stored
    if WHOLE and NEED_WEIGHT:
        tl.store(partial + tl.cast(pid, tl.int64) * H + cols, tl.sum(total, 0), mask=cols < H)


@triton.jit
def _sum_columns(
    partial, line_stride, part_stride, first, second, H, LINES, LINE_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(1)
    total = tl.zeros((LINE_BLOCK, BLOCK), partial.dtype.element_ty)
    for start in range(0, LINES, LINE_BLOCK):
        lines = start + tl.arange(0, LINE_BLOCK)[:, None]
        slots = partial + lines.to(tl.int64) * line_stride + part * part_stride + cols
        total += tl.load(slots, mask=(lines < LINES) & (cols < H), other=0.0)
    sums = tl.sum(total, 0)[None, :]
    if part == 0:
        tl.store(first + cols, rounded(sums, first), mask=cols < H)
    else:
        tl.store(second + cols, rounded(sums, second), mask=cols < H)


def column_sums(name: str, partial: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Sums of ``[lines, parts, H]`` (fp32 or fp64, one or two parts) over the lines: one ``[H]`` of each dtype."""
    lines, parts, h = partial.shape
    outs = [dispatch.allocate((h,), dtype, partial.device) for dtype in dtypes]
    block = 1024 if interpreting() else 32  # 128 bytes a line of fp32; the interpreter takes long for each program
    launch(
        name, _sum_columns, (cdiv(h, block), parts), partial.device,
        partial, partial.stride(0), partial.stride(1), outs[0], outs[-1], h, lines,
        LINE_BLOCK=64, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return outs


def writable_rows(out: Tensor) -> tuple[Tensor, Rows]:
    """Rows of memory that can be written where it lies, or else of a buffer to be copied into it afterwards."""
    rows = Rows(out)
    if rows.tensor is out:
        return out, rows
    buffer = dispatch.allocate(out.shape, out.dtype, out.device)
    return buffer, Rows(buffer)


def forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    copy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The normed tensor (x's dtype; contiguous, or ``out``), 1/rms of each row, and what was normed or None.

    With a ``residual`` it is its sum with x; a ``copy`` of x costs no reading of its own."""
    wide = wide_dtype(x)
    y = dispatch.allocate(x.shape, x.dtype, x.device) if out is None else out
    total = dispatch.allocate(x.shape, x.dtype, x.device) if copy or residual is not None else None
    rstd = dispatch.allocate(x.shape[:-1], wide, x.device)
    if y.numel() == 0:
        return y, rstd.zero_(), total
    written, target = writable_rows(y)
    source = Rows(x)
    other = source if residual is None else Rows(residual)
    h = x.shape[-1]
    tiling = tuning.settings("rms_norm_forward", x.device, (h, x.dtype), default=forward_tiling(h, wide))
    launch(
        "rms_norm_forward", _forward, (cdiv(source.count, tiling["ROWS"]),), x.device,
        source.tensor, *source.layout, other.tensor, *other.layout, x if weight is None else weight.contiguous(),
        written, *target.layout, y if total is None else total, rstd, source.count, h,
        *two_floats(eps), *two_floats(offset),
        ADD=residual is not None, COPY=copy and residual is None, HAS_WEIGHT=weight is not None,
        WIDE=triton_dtype(wide), **tiling,
    )  # fmt: skip
    if written is not y:
        y.copy_(written)
    return y, rstd, total


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    need_weight: bool,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight (an empty tensor where it is not needed).

    Args:
        dy: the gradient of the normed tensor.
        x: what was normalized (with a residual: the sum).
        weight, offset: as in the forward pass.
        rstd: from the forward pass.
        need_weight: whether the weight's gradient is wanted.
        add: a gradient ``[..., H]`` to add to that of x before it is rounded: of the sum with the residual.
        out: where to write the gradient of x, of any strides; ``add`` itself is allowed, which accumulates in place.
    """
    h = x.shape[-1]
    dx = dispatch.allocate(x.shape, x.dtype, x.device) if out is None else out
    dtype = x.dtype if weight is None else weight.dtype
    if not dx.numel():
        return dx, dx.new_zeros(h if need_weight else 0, dtype=dtype)
    up, source = Rows(dy), Rows(x)
    more = source if add is None else Rows(add)
    written, target = writable_rows(dx)
    loop_bytes = dy.element_size() + x.element_size() + (0 if add is None else add.element_size())
    default = backward_tiling(h, rstd.dtype, x.device, loop_bytes if need_weight else 0)
    key = (h, x.dtype, dy.dtype, need_weight, add is not None)
    tiling = tuning.settings(
        "rms_norm_backward", x.device, key, default=default, candidates=lambda: backward_candidates(default)
    )
    programs, per_sm = cdiv(source.count, tiling["ROWS"]), tiling.pop("PER_SM")
    if need_weight:
        programs = sharing_programs(x.device, programs, per_sm)
    partial = dispatch.allocate((programs, 1, h) if need_weight else (0,), rstd.dtype, x.device)
    launch(
        "rms_norm_backward", _backward, (programs,), x.device,
        up.tensor, *up.layout, source.tensor, *source.layout, x if weight is None else weight.contiguous(), rstd,
        more.tensor, *more.layout, written, *target.layout, partial, source.count, h, *two_floats(offset),
        ADD=add is not None, HAS_WEIGHT=weight is not None, NEED_WEIGHT=need_weight,
        WIDE=triton_dtype(rstd.dtype), **tiling,
    )  # fmt: skip
    if written is not dx:
        dx.copy_(written)
    return dx, column_sums("rms_norm_weight_sums", partial, [dtype])[0] if need_weight else dx.new_empty(0, dtype=dtype)
