"""Layer normalization in Triton.

With m = mean(x), r = 1/sqrt(mean((x − m)²) + eps), x̂ = (x − m)·r and g = dy·weight:

    y = x̂·weight + bias        dx = r·(g − mean(g) − x̂·mean(g·x̂))        dweight = Σ_rows dy·x̂        dbias = Σ_rows dy

The arithmetic is that of :mod:`ft_kernels.ops.rms_norm.kernels`: fp32 for 16-bit tensors, fp64 for fp32 ones and for
rows so short that the terms of dx cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import Rows, cdiv, launch
from ft_kernels.ops.rms_norm.kernels import (
    column_sums,
    rounded,
    row_start,
    triton_dtype,
    two_floats,
    wide_dtype,
    writable_rows,
)
from ft_kernels.ops.rms_norm.tilings import backward_candidates, backward_tiling, forward_tiling, sharing_programs

__all__ = ["backward", "forward", "wide_dtype"]


@triton.jit
def _parameter(pointer, cols, mask, GIVEN: tl.constexpr, OTHERWISE: tl.constexpr, WIDE: tl.constexpr):
    value = tl.full(cols.shape, OTHERWISE, WIDE)
    if GIVEN:
        value = tl.load(pointer + cols, mask=mask, other=0.0).to(WIDE)
    return value[None, :]


@triton.jit
def _forward(
    x, x_inner, x_outer_stride, x_inner_stride, weight, bias, y, y_inner, y_outer_stride, y_inner_stride, mean, rstd,
    N, H, eps, eps_rest,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (rows < N)[:, None]
    source = row_start(x, rows, x_inner, x_outer_stride, x_inner_stride)
    target = row_start(y, rows, y_inner, y_outer_stride, y_inner_stride)
    cols = tl.arange(0, BLOCK)
    if WHOLE:
        mask = there & (cols < H)[None, :]
        values = tl.load(source + cols[None, :], mask=mask, other=0.0).to(WIDE)
        if HOIST:  # so that they come while the row is being added up (1.6 % of the time on an H100)
            scale = _parameter(weight, cols, cols < H, HAS_WEIGHT, 1.0, WIDE)
            shift = _parameter(bias, cols, cols < H, HAS_BIAS, 0.0, WIDE)
        m = tl.sum(values, 1) / H
        values = tl.where((cols < H)[None, :], values - m[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(values * values, 1) / H + eps + eps_rest)
        if not HOIST:
            scale = _parameter(weight, cols, cols < H, HAS_WEIGHT, 1.0, WIDE)
            shift = _parameter(bias, cols, cols < H, HAS_BIAS, 0.0, WIDE)
        tl.store(target + cols[None, :], rounded(values * r[:, None] * scale + shift, y), mask=mask)
    else:
        sums = tl.zeros((ROWS, BLOCK), WIDE)
        for start in range(0, H, BLOCK):
            here = start + cols
            sums += tl.load(source + here[None, :], mask=there & (here < H)[None, :], other=0.0).to(WIDE)
        m = tl.sum(sums, 1) / H
        squares = tl.zeros((ROWS, BLOCK), WIDE)
        for start in range(0, H, BLOCK):
            here = start + cols
            values = tl.load(source + here[None, :], mask=there & (here < H)[None, :], other=0.0).to(WIDE)
            values = tl.where((here < H)[None, :], values - m[:, None], 0.0)
            squares += values * values
        r = 1.0 / tl.sqrt(tl.sum(squares, 1) / H + eps + eps_rest)
        for start in range(0, H, BLOCK):
            here = start + cols
            mask = there & (here < H)[None, :]
            values = tl.load(source + here[None, :], mask=mask, other=0.0).to(WIDE) - m[:, None]
            scale = _parameter(weight, here, here < H, HAS_WEIGHT, 1.0, WIDE)
            shift = _parameter(bias, here, here < H, HAS_BIAS, 0.0, WIDE)
            tl.store(target + here[None, :], rounded(values * r[:, None] * scale + shift, y), mask=mask)
    tl.store(mean + rows, m, mask=rows < N)
    tl.store(rstd + rows, r, mask=rows < N)


@triton.jit
def _backward(
    dy, dy_inner, dy_outer_stride, dy_inner_stride, x, x_inner, x_outer_stride, x_inner_stride, weight, mean, rstd,
    dx, partial, line_stride, bias_part, N, H,
    HAS_WEIGHT: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, HOIST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    weight_line = partial + tl.cast(pid, tl.int64) * line_stride
    bias_line = weight_line + bias_part
    if WHOLE and HOIST:
        scale = _parameter(weight, cols, cols < H, HAS_WEIGHT, 1.0, WIDE)
    if WHOLE and NEED_WEIGHT:
        weight_total = tl.zeros((ROWS, BLOCK), WIDE)
    if WHOLE and NEED_BIAS:
        bias_total = tl.zeros((ROWS, BLOCK), WIDE)
    # Where nothing is summed over the rows there are as many programs as tiles, and this runs once. Else the loads of
    # the next tiles are on their way (STAGES) while this one is worked on.
    for tile in tl.range(pid, tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (rows < N)[:, None]
        x_row = row_start(x, rows, x_inner, x_outer_stride, x_inner_stride)
        dy_row = row_start(dy, rows, dy_inner, dy_outer_stride, dy_inner_stride)
        dx_row = dx + (rows * H)[:, None]
        m = tl.load(mean + rows, mask=rows < N, other=0.0)[:, None]
        r = tl.load(rstd + rows, mask=rows < N, other=0.0)[:, None]
        if WHOLE:
            mask = there & (cols < H)[None, :]
            up = tl.load(dy_row + cols[None, :], mask=mask, other=0.0).to(WIDE)
            # Beyond the row, where x̂ is not 0, dy is: no sum sees it.
            normed = (tl.load(x_row + cols[None, :], mask=mask, other=0.0).to(WIDE) - m) * r
            if not HOIST:
                scale = _parameter(weight, cols, cols < H, HAS_WEIGHT, 1.0, WIDE)
            g = up * scale
            mean_g = (tl.sum(g, 1) / H)[:, None]
            mean_product = (tl.sum(g * normed, 1) / H)[:, None]
            tl.store(dx_row + cols[None, :], rounded(r * (g - mean_g - normed * mean_product), dx), mask=mask)
            if NEED_WEIGHT:
                weight_total += up * normed
            if NEED_BIAS:
                bias_total += up
        else:
            sums = tl.zeros((ROWS, BLOCK), WIDE)
            products = tl.zeros((ROWS, BLOCK), WIDE)
            for start in range(0, H, BLOCK):
                here = start + cols
                mask = there & (here < H)[None, :]
                up = tl.load(dy_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                normed = (tl.load(x_row + here[None, :], mask=mask, other=0.0).to(WIDE) - m) * r
                g = up * _parameter(weight, here, here < H, HAS_WEIGHT, 1.0, WIDE)
                sums += g
                products += g * normed
            mean_g = (tl.sum(sums, 1) / H)[:, None]
            mean_product = (tl.sum(products, 1) / H)[:, None]
            for start in range(0, H, BLOCK):
                here = start + cols
                mask = there & (here < H)[None, :]
                up = tl.load(dy_row + here[None, :], mask=mask, other=0.0).to(WIDE)
                normed = (tl.load(x_row + here[None, :], mask=mask, other=0.0).to(WIDE) - m) * r
                g = up * _parameter(weight, here, here < H, HAS_WEIGHT, 1.0, WIDE)
                tl.store(dx_row + here[None, :], rounded(r * (g - mean_g - normed * mean_product), dx), mask=mask)
                # The program's own lines of `partial`: nobody else writes them, and its first tile does not read them.
                first = (here < H) & (tile != pid)
                if NEED_WEIGHT:
                    before = tl.load(weight_line + here, mask=first, other=0.0)
                    tl.store(weight_line + here, before + tl.sum(up * normed, 0), mask=here < H)
                if NEED_BIAS:
                    before = tl.load(bias_line + here, mask=first, other=0.0)
                    tl.store(bias_line + here, before + tl.sum(up, 0), mask=here < H)
            if NEED_WEIGHT or NEED_BIAS:
                tl.debug_barrier()  # the next tile may load what another thread stored
    if WHOLE and NEED_WEIGHT:
        tl.store(weight_line + cols, tl.sum(weight_total, 0), mask=cols < H)
    if WHOLE and NEED_BIAS:
        tl.store(bias_line + cols, tl.sum(bias_total, 0), mask=cols < H)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed tensor (x's dtype; contiguous, or ``out``), and the mean and 1/deviation of each row."""
    wide = wide_dtype(x)
    y = dispatch.allocate(x.shape, x.dtype, x.device) if out is None else out
    mean, rstd = (dispatch.allocate(x.shape[:-1], wide, x.device) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    written, target = writable_rows(y)
    source, h = Rows(x), x.shape[-1]
    scale, shift = (x if t is None else t.contiguous() for t in (weight, bias))
    default = forward_tiling(h, wide)
    tiling = tuning.settings("layer_norm_forward", x.device, (h, x.dtype), default=default)
    launch(
        "layer_norm_forward", _forward, (cdiv(source.count, tiling["ROWS"]),), x.device,
        source.tensor, *source.layout, scale, shift, written, *target.layout, mean, rstd, source.count, h,
        *two_floats(eps), HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, WIDE=triton_dtype(wide), **tiling,
    )  # fmt: skip
    if written is not y:
        y.copy_(written)
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (an empty tensor where one is not needed)."""
    h = x.shape[-1]
    dx = dispatch.allocate(x.shape, x.dtype, x.device)
    needs = [need_weight, need_bias]
    dtypes = [x.dtype if parameter is None else parameter.dtype for parameter in (weight, bias)]
    if dx.numel() == 0:
        dweight, dbias = (dx.new_zeros(h if n else 0, dtype=d) for n, d in zip(needs, dtypes, strict=True))
        return dx, dweight, dbias
    up, source, looping = Rows(dy), Rows(x), any(needs)
    loop_bytes = dy.element_size() + x.element_size() if looping else 0
    default = backward_tiling(h, rstd.dtype, x.device, loop_bytes)
    default["HOIST"] &= not (looping and rstd.dtype == torch.float64)  # with two sums in fp64 registers run out
    key = (h, x.dtype, dy.dtype, need_weight, need_bias)
    tiling = tuning.settings(
        "layer_norm_backward", x.device, key, default=default, candidates=lambda: backward_candidates(default)
    )
    programs, per_sm = cdiv(source.count, tiling["ROWS"]), tiling.pop("PER_SM")
    if looping:
        programs = sharing_programs(x.device, programs, per_sm)
    partial = dispatch.allocate((programs if looping else 0, sum(needs), h), rstd.dtype, x.device)
    launch(
        "layer_norm_backward", _backward, (programs,), x.device,
        up.tensor, *up.layout, source.tensor, *source.layout, x if weight is None else weight.contiguous(), mean, rstd,
        dx, partial, sum(needs) * h, h if need_weight else 0, source.count, h,
        HAS_WEIGHT=weight is not None, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
        WIDE=triton_dtype(rstd.dtype), **tiling,
    )  # fmt: skip
    sums = []
    if looping:
        sums = column_sums("layer_norm_sums", partial, [d for n, d in zip(needs, dtypes, strict=True) if n])
    dweight, dbias = (sums.pop(0) if n else dx.new_empty(0, dtype=d) for n, d in zip(needs, dtypes, strict=True))
    return dx, dweight, dbias
