"""What surrounds the matrix products, in Triton: the memory passes of a product with low-rank updates.

With R the adapters' ranks together, A ``[R, K]`` all of them stacked and S ``[N, R]`` their scaled B side by side, each
in its own rows (zeros elsewhere):

    rows          [x | x·Aᵀ] from x, which is read once
    b_gradient    dB = scaling · dYᵀ·(x·Aᵀ), each adapter's block alone
    a_gradient    dA = d(xA)ᵀ·x, and in the same pass dX += d(xA)·A

All are bound by memory. The sums over rows are split among programs that write partial sums; these are added in a fixed
order, so that every result is the same bit for bit each time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, interpreting, launch
from ft_kernels.ops.lora.tiles import kept, loads_ahead, operand, ranks_block, rounded, rounds_by_hand
from ft_kernels.ops.rms_norm.kernels import two_floats

__all__ = [
    "Options",
    "a_gradient",
    "b_gradient",
    "column_share",
    "join",
    "rows",
    "share",
    "splits",
    "three",
]

Options = tuple[dict[str, Any], list[dict[str, Any]]]
"""Launch settings, and others that may be tried."""


@triton.jit
def _rows(
    x, x_stride, wide, wide_stride, partial, packed, seed, threshold, inverse, first_row, M, K, R, cols_each,
    end0, end1,
    COPY: tl.constexpr, DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    BY_HAND: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * cols_each
    ranks = tl.arange(0, RP)
    there = (rows < M)[:, None]
    total = tl.zeros((BM, RP), tl.float32)
    for start in range(first, tl.minimum(first + cols_each, K), BK):
        cols = start + tl.arange(0, BK)
        mask = there & (cols < K)[None, :]
        values = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
        inside = (ranks < R)[:, None] & (cols < K)[None, :]
        low = operand(tl.load(packed + ranks[:, None] * K + cols[None, :], mask=inside, other=0.0), INTERPRETED)
        if COPY:
            tl.store(wide + rows[:, None] * wide_stride + cols[None, :], values, mask=mask)
        if DROPS == 0:
            total = tl.dot(operand(values, INTERPRETED), tl.trans(low), total)
        for i in tl.static_range(DROPS):
            mine = _segment(ranks, end0, end1, i, DROPS)
            left = rounded(
                kept(values, seed, rows[:, None], cols[None, :], threshold, inverse, first_row, i), x, BY_HAND
            )
            right = tl.where(mine[:, None], low, 0.0)
            total = tl.dot(operand(left, INTERPRETED), tl.trans(right), total)
    slot = partial + (tl.program_id(1) * M + rows[:, None]) * R + ranks[None, :]
    tl.store(slot, total, mask=there & (ranks < R)[None, :])


@triton.jit
def _join(
    partial, tail, wide, wide_stride, K, COUNT, R, parts, WIDE: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < COUNT
    part = partial + i
    total = tl.load(part, mask=there, other=0.0)
    for _ in range(1, parts):
        part += COUNT
        total += tl.load(part, mask=there, other=0.0)
    result = rounded(total, tail, BY_HAND)
    tl.store(tail + i, result, mask=there)
    if WIDE:
        tl.store(wide + (i // R) * wide_stride + K + i % R, result, mask=there)


@triton.jit
def _segment(ranks, end0, end1, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """Which ranks are those of adapter INDEX."""
    mine = ranks >= 0
    if INDEX == 0 and COUNT > 1:
        mine = ranks < end0
    if INDEX == 1:
        mine = ranks >= end0
        if COUNT > 2:
            mine = mine & (ranks < end1)
    if INDEX == 2:
        mine = ranks >= end1
    return mine


@triton.jit
def _b_gradient(
    dy, dy_stride, tail, partial, split_stride, M, R, share, tiles0, tiles1,
    start0, start1, start2, n0, n1, n2, r0, r1, r2, s0, s1, s2, offset,
    COUNT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, RP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    start, n, r, scaling, first_tile, first_rank, first_slot = start0, n0, r0, s0, 0, 0, 0
    if COUNT > 1:
        second = tile >= tiles0
        start, n, r = tl.where(second, start1, start0), tl.where(second, n1, n0), tl.where(second, r1, r0)
        scaling, first_tile = tl.where(second, s1, s0), tl.where(second, tiles0, 0)
        first_rank, first_slot = tl.where(second, r0, 0), tl.where(second, n0 * r0, 0)
    if COUNT > 2:
        third = tile >= tiles0 + tiles1
        start, n, r = tl.where(third, start2, start), tl.where(third, n2, n), tl.where(third, r2, r)
        scaling, first_tile = tl.where(third, s2, scaling), tl.where(third, tiles0 + tiles1, first_tile)
        first_rank = tl.where(third, r0 + r1, first_rank)
        first_slot = tl.where(third, n0 * r0 + n1 * r1, first_slot)
    cols = (tile - first_tile) * BC + tl.arange(0, BC)
    ranks = tl.arange(0, RP)
    total = tl.zeros((BC, RP), tl.float32)
    for first in range(split * share, tl.minimum(split * share + share, M), BM):
        rows = first + tl.arange(0, BM).to(tl.int64)
        there = (rows < M)[:, None]
        here = dy + rows[:, None] * dy_stride + (start + cols)[None, :]
        up = tl.load(here, mask=there & (cols < n)[None, :], other=0.0)
        here = tail + rows[:, None] * R + (first_rank + ranks)[None, :]
        low = tl.load(here, mask=there & (ranks < r)[None, :], other=0.0)
        total = tl.dot(tl.trans(operand(up, INTERPRETED)), operand(low, INTERPRETED), total)
    line = partial + split.to(tl.int64) * split_stride + offset + first_slot
    slot = line + cols[:, None].to(tl.int64) * r + ranks[None, :]
    tl.store(slot, total * scaling, mask=(cols < n)[:, None] & (ranks < r)[None, :])


@triton.jit
def _a_gradient(
    x, x_stride, low, low_stride, packed, dx, dx_stride, out, out_stride, partial, split_stride,
    norm, rstd, offset, offset_rest, seed, threshold, inverse, first_row, M, K, R, ranks_given, share, end0, end1,
    NORM: tl.constexpr, UPDATE: tl.constexpr, SUM: tl.constexpr, DROPS: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, RP: tl.constexpr, STAGES: tl.constexpr, BY_HAND: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    ranks = tl.arange(0, RP)
    if NORM:
        scale = (tl.load(norm + cols, mask=cols < K, other=0.0).to(tl.float32) + offset + offset_rest)[None, :]
    total = tl.zeros((BC, RP), tl.float32)
    inside = (ranks < R)[:, None] & (cols < K)[None, :]
    a = operand(tl.load(packed + ranks[:, None] * K + cols[None, :], mask=inside, other=0.0), INTERPRETED)
    # Told by tl.range, the compiler loads ahead what no product takes as it is, too.
    last = tl.minimum(split * share + share, M)
    for first in tl.range(split * share, last, BM, num_stages=STAGES):
        rows = first + tl.arange(0, BM).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        low_mask = (rows < M)[:, None] & (ranks < R)[None, :]
        up = operand(tl.load(low + rows[:, None] * low_stride + ranks[None, :], mask=low_mask, other=0.0), INTERPRETED)
        if SUM:
            values = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
            if NORM:
                factor = tl.load(rstd + rows, mask=rows < M, other=0.0)[:, None]
                values = rounded(values.to(tl.float32) * factor * scale, x, BY_HAND)
        if UPDATE:
            slot = dx + rows[:, None] * dx_stride + cols[None, :]
            result = tl.load(slot, mask=mask, other=0.0).to(tl.float32)
        if DROPS == 0:
            if SUM:
                total = tl.dot(tl.trans(operand(values, INTERPRETED)), up, total)
            if UPDATE:
                result = tl.dot(up, a, result)
        for i in tl.static_range(DROPS):
            mine = tl.where(_segment(ranks, end0, end1, i, DROPS)[None, :], up, 0.0)
            if SUM:
                left = rounded(
                    kept(values, seed, rows[:, None], cols[None, :], threshold, inverse, first_row, i), x, BY_HAND
                )
                total = tl.dot(tl.trans(operand(left, INTERPRETED)), mine, total)
            if UPDATE:
                result += kept(tl.dot(mine, a), seed, rows[:, None], cols[None, :], threshold, inverse, first_row, i)
        if UPDATE:
            slot = out + rows[:, None] * out_stride + cols[None, :]
            tl.store(slot, rounded(result, out, BY_HAND), mask=mask)
    if SUM:
        slot = partial + split.to(tl.int64) * split_stride + ranks[None, :] * K + cols[:, None]
        tl.store(slot, total, mask=(cols < K)[:, None] & (ranks < ranks_given)[None, :])


def three(values: Any, other: Any) -> list[Any]:
    """Of up to three adapters, with something in the place of those that are not there."""
    return [*values, *[other] * (3 - len(values))]


def rows(x: Tensor, k: int, packed: Tensor, low: Any, wide: Tensor | None, drop: Any) -> Tensor:
    """``x Aᵀ`` as ``[M, R]`` and as the tail of ``wide``, whose left part gets a copy of x unless that is x itself."""
    m, r, device = x.shape[0], low.padded, x.device
    copy = wide is not None and wide.data_ptr() != x.data_ptr()
    rp = ranks_block(r)
    default, more = _rows_options(rp, drop.p > 0, device)
    tiling = tuning.settings("lora_rows", device, (k, r, copy, drop.p > 0), default=default, candidates=more)
    each, parts = column_share(m, k, tiling["BM"], tiling["BK"], device)
    partial = dispatch.allocate((parts, m, r), torch.float32, device)
    launch(
        "lora_rows", _rows, (cdiv(m, tiling["BM"]), parts), device,
        x, x.stride(0), x if wide is None else wide, 0 if wide is None else wide.stride(0), partial, packed,
        *drop.arguments(x), m, k, r, each, *low.ends(),
        COPY=copy, DROPS=len(low.a) if drop.p else 0, RP=rp,
        BY_HAND=rounds_by_hand(x.dtype), INTERPRETED=interpreting(), **tiling,
    )  # fmt: skip
    return join(partial, wide, k, x.dtype)


@functools.cache
def _rows_options(rp: int, drops: bool, device: torch.device) -> Options:
    options = [(64, 64, 4, 4), (128, 64, 4, 4), (64, 64, 8, 4), (32, 128, 4, 4)]
    if drops or rp > 64 or tuning.capability(device) < (9, 0):
        options = [(32, 64, 4, 4), (32, 64, 8, 4)]
    if tuning.family(device) == "turing":
        options = [(16, 64, 4, 1)]
    default, *more = [
        {"BM": bm, "BK": bk, "num_warps": warps, "num_stages": loads_ahead((bm + rp) * bk * 2, most, device)}
        for bm, bk, warps, most in options
    ]
    return default, more


@functools.cache
def column_share(m: int, k: int, bm: int, bk: int, device: torch.device, programs: int = 2) -> tuple[int, int]:
    """Of K columns, how many a program goes through and among how many programs a row is split.

    There are so many ``programs`` for each multiprocessor if there are columns enough: they hide one another's waiting.
    """
    tiles = cdiv(k, bk)
    if interpreting():
        parts = min(2, tiles)
    else:
        wanted = cdiv(programs * tuning.multiprocessors(device), cdiv(m, bm))
        parts = max(1, min(wanted, tiles // 2, 32))
    each = cdiv(tiles, parts) * bk
    return each, cdiv(k, each)


def join(partial: Tensor, wide: Tensor | None, k: int, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of ``[parts, M, R]`` as ``[M, R]``, and in ``wide`` after the first K columns."""
    parts, m, r = partial.shape
    device = partial.device
    tail = dispatch.allocate((m, r), dtype or partial.dtype if wide is None else wide.dtype, device)
    block = 1024
    launch(
        "lora_join", _join, (cdiv(m * r, block),), device,
        partial, tail, tail if wide is None else wide, 0 if wide is None else wide.stride(0), k, m * r, r, parts,
        WIDE=wide is not None, BLOCK=block, BY_HAND=rounds_by_hand(tail.dtype), num_warps=4,
    )  # fmt: skip
    return tail


def splits(m: int, k: int, device: torch.device) -> int:
    """Among how many programs the rows are split, so that sums over them occupy the device."""
    if interpreting():
        return min(2, -(-m // 64))
    wanted = tuning.multiprocessors(device) // max(1, k // 128)
    return max(1, min(wanted, -(-m // 256)))


def share(m: int, parts: int, tile: int) -> int:
    """How many rows each part gets, in whole tiles."""
    return -(-m // (tile * parts)) * tile


def _option(
    bm: int, bc: int, warps: int, tiles: int, rp: int, device: torch.device, stages: str = "num_stages"
) -> dict[str, Any]:
    return {"BM": bm, "BC": bc, "num_warps": warps, stages: loads_ahead((tiles * bc + rp) * bm * 2, 4, device)}


@functools.cache
def _b_options(rp: int, device: torch.device) -> Options:
    options = [(64, 128, 4), (64, 64, 4), (32, 128, 4), (64, 128, 8), (128, 64, 4)]
    if tuning.family(device) == "hopper" and rp <= 64:
        options = [(64, 64, 4), (64, 128, 4), (32, 64, 4), (128, 32, 4)]
    if tuning.family(device) == "turing":
        options = [(32, 64, 4)]
    default, *more = [_option(*option, 1, rp, device) for option in options]
    return default, more if rp <= 64 else []


@functools.cache
def _a_options(rp: int, drops: bool, device: torch.device) -> Options:
    # Two tiles, their sum and, with dropout, the state of the random numbers share the registers.
    options = [(64, 128, 8), (64, 64, 4), (32, 128, 8), (32, 64, 4)]
    if drops or rp > 32 or tuning.capability(device) < (9, 0):
        options = [(32, 64, 8)] if drops or rp > 64 else [(32, 128, 8), (32, 64, 4)]
    if tuning.family(device) == "hopper" and not drops and rp <= 64:
        options = [(32, 64, 4), (64, 64, 4), (64, 128, 8), (16, 64, 4), (32, 32, 2), (32, 32, 1)]
    if tuning.family(device) == "turing":
        options = [(32, 64, 8)]
    default, *more = [_option(*option, 2, rp, device, "STAGES") for option in options]
    return default, more


def b_gradient(dy: Tensor, tail: Tensor, low: Any, partial: Tensor, offset: int) -> None:
    """Each part's dB (scaled), one adapter after the other, into ``partial [parts, ...]`` from ``offset`` on."""
    m, parts, device = dy.shape[0], partial.shape[0], dy.device
    rp = ranks_block(max(low.ranks))
    default, more = _b_options(rp, device)
    tiling = tuning.settings("lora_b_gradient", device, (*low.sizes, rp), default=default, candidates=more)
    tiles = [cdiv(n, tiling["BC"]) for n in low.sizes]
    launch(
        "lora_b_gradient", _b_gradient, (sum(tiles), parts), device,
        dy, dy.stride(0), tail, partial, partial.stride(0), m, low.padded, share(m, parts, tiling["BM"]),
        *three(tiles, 0)[:2], *three(low.starts, 0), *three(low.sizes, 0), *three(low.ranks, 0),
        *three(low.scaling, 0.0), offset, COUNT=len(tiles), RP=rp, INTERPRETED=interpreting(), **tiling,
    )  # fmt: skip


def a_gradient(
    x: Tensor, k: int, dlow: Tensor, packed: Tensor, low: Any, partial: Tensor | None, dx: Tensor | None, parts: int,
    drop: Any, out: Tensor | None = None, norm: Any = None,
) -> None:  # fmt: skip
    """Each part's dA ``[R, K]`` to the start of ``partial [parts, ...]``, and ``dx + dlow A`` over dx or into ``out``.

    Either of ``partial`` and dx may be None. With a norm x is taken as it says.
    """
    m, device = dlow.shape[0], x.device
    rp = ranks_block(low.padded)
    default, more = _a_options(rp, drop.p > 0, device)
    key = (k, rp, dx is not None, partial is not None, drop.p > 0, *(["norm"] if norm else []))
    tiling = tuning.settings("lora_a_gradient", device, key, default=default, candidates=more)
    source, sums = x if dx is None else dx, dlow if partial is None else partial
    target = source if out is None else out
    scale = (x, sums, 0.0, 0.0) if norm is None else (norm.weight.contiguous(), norm.rstd, *two_floats(norm.offset))
    launch(
        "lora_a_gradient", _a_gradient, (cdiv(k, tiling["BC"]), parts), device,
        x, x.stride(0), dlow, dlow.stride(0), packed, source, source.stride(0), target, target.stride(0),
        sums, sums.stride(0), *scale, *drop.arguments(x), m, k, low.padded, low.r, share(m, parts, tiling["BM"]),
        *low.ends(), NORM=norm is not None, UPDATE=dx is not None, SUM=partial is not None,
        DROPS=len(low.a) if drop.p else 0, RP=rp, BY_HAND=rounds_by_hand(x.dtype), INTERPRETED=interpreting(), **tiling,
    )  # fmt: skip
