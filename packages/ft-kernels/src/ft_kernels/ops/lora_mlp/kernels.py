"""The gated activation between two products with low-rank updates, in Triton, in one pass each way.

    hidden    h = a(gate)·up, and h·Aᵀ beside it, while h is there
    middle    dh += D·A, dgate = dh·up·a'(gate) and dup = dh·a(gate) over gate and up, and while all of them are there
              dA = Dᵀ·h, dB_gate = dgateᵀ·T_gate and dB_up = dupᵀ·T_up

with D the gradient of h·Aᵀ and T what the adapters of gate and up made of their input. `middle` moves what the
activation's backward alone would: without it dh, h, dgate and dup would make six more trips to memory. A program has
some columns and a share of the rows, or the other way round, and writes its part of each sum; the parts are added in a
fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, interpreting, launch, native
from ft_kernels.ops.glu.kernels import _activation as activation
from ft_kernels.ops.lora.kernels import Options, column_share, join, share
from ft_kernels.ops.lora.tiles import (
    computed_once,
    kept,
    loads_ahead,
    operand,
    ranks_block,
    rounded,
    rounds_by_hand,
)

__all__ = ["hidden", "middle", "middle_parts"]


@triton.jit
def _quick_sigmoid(v):
    """σ(v)·2^24, by the card's own exponential and reciprocal, without the care for their smallest results.

    With the factor none of them is that small: where σ(v) would be, σ(v)·2^24 is not.
    """
    e = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [v * -1.4426950408889634 - 24.0], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [e + 5.9604644775390625e-08], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _active(x, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """a(x) and a'(x), for 16-bit numbers.

    These passes do four times what the activation alone does, and wait for their instructions more than for memory. Two
    units in the last place of fp32 don't matter here, half of the instructions do.
    """
    if NATIVE and KIND != 1:
        if KIND == 0:
            v = x
        else:
            near = tl.minimum(tl.maximum(x, -100.0), 100.0)
            square = near * near
            v = 1.5957691216057308 * near * (1.0 + 0.044715 * square)
        r = _quick_sigmoid(v)
        s = r * 5.9604644775390625e-08
        active = x * 5.9604644775390625e-08 * r
        if KIND == 0:
            slope = s + active * (1.0 - s)
        else:
            slope = s + active * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        active, slope = activation(x, KIND, tl.float32)
    return active, slope


@triton.jit
def _hidden(
    gate_up, gate_up_stride, wide, wide_stride, partial, packed, seed, threshold, inverse, first_row, M, WIDTH, R,
    cols_each,
    KIND: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
    BY_HAND: tl.constexpr, INTERPRETED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * cols_each
    ranks = tl.arange(0, RP)
    there = (rows < M)[:, None]
    total = tl.zeros((BM, RP), tl.float32)
    for start in range(first, tl.minimum(first + cols_each, WIDTH), BK):
        cols = start + tl.arange(0, BK)
        mask = there & (cols < WIDTH)[None, :]
        source = gate_up + rows[:, None] * gate_up_stride + cols[None, :]
        x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
        inside = (ranks < R)[:, None] & (cols < WIDTH)[None, :]
        low = operand(tl.load(packed + ranks[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0), INTERPRETED)
        h = computed_once(rounded(_active(x, KIND, NATIVE)[0] * u, wide, BY_HAND), NATIVE)
        tl.store(wide + rows[:, None] * wide_stride + cols[None, :], h, mask=mask)
        if DROP:
            h = rounded(kept(h, seed, rows[:, None], cols[None, :], threshold, inverse, first_row, 0), wide, BY_HAND)
            h = computed_once(h, NATIVE)
        total = tl.dot(operand(h, INTERPRETED), tl.trans(low), total)
    slot = partial + (tl.program_id(1) * M + rows[:, None]) * R + ranks[None, :]
    tl.store(slot, total, mask=there & (ranks < R)[None, :])


@triton.jit
def _middle(
    gate_up, gate_up_stride, dh, dh_stride, low, low_stride, packed, tail, tail_stride, partial, split_stride,
    a_slot, gate_slot, up_slot, seed, threshold, inverse, first_row, M, WIDTH, R,
    a_ranks, gate_ranks, up_ranks, gate_first, up_first, gate_scaling, up_scaling, rows_each,
    KIND: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    RP: tl.constexpr, RT: tl.constexpr, STAGES: tl.constexpr, BY_HAND: tl.constexpr, INTERPRETED: tl.constexpr,
    NATIVE: tl.constexpr, LONG_SIDE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    ranks, others = tl.arange(0, RP), tl.arange(0, RT)
    inside = (ranks < R)[:, None] & (cols < WIDTH)[None, :]
    a = operand(tl.load(packed + ranks[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0), INTERPRETED)
    a_total = tl.zeros((BC, RP), tl.float32)
    gate_total = tl.zeros((BC, RT), tl.float32)
    up_total = tl.zeros((BC, RT), tl.float32)
    # Told by tl.range, the compiler loads ahead what no product takes as it is, too.
    last = tl.minimum(split * rows_each + rows_each, M)
    for first in tl.range(split * rows_each, last, BM, num_stages=STAGES):
        rows = first + tl.arange(0, BM).to(tl.int64)
        there = (rows < M)[:, None]
        mask = there & (cols < WIDTH)[None, :]
        place = gate_up + rows[:, None] * gate_up_stride + cols[None, :]
        x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(place + WIDTH, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dh + rows[:, None] * dh_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        here = low + rows[:, None] * low_stride + ranks[None, :]
        up_low = operand(tl.load(here, mask=there & (ranks < R)[None, :], other=0.0), INTERPRETED)
        active, slope = _active(x, KIND, NATIVE)
        h = computed_once(rounded(active * u, gate_up, BY_HAND), NATIVE)
        # The long side first: a tile of few rows would be computed by several warps at once, and all that follows it.
        more = tl.trans(tl.dot(tl.trans(a), tl.trans(up_low))) if LONG_SIDE else tl.dot(up_low, a)
        if DROP:
            d += kept(more, seed, rows[:, None], cols[None, :], threshold, inverse, first_row, 0)
            h = rounded(kept(h, seed, rows[:, None], cols[None, :], threshold, inverse, first_row, 0), gate_up, BY_HAND)
            h = computed_once(h, NATIVE)
        else:
            d += more
        a_total = tl.dot(tl.trans(operand(h, INTERPRETED)), up_low, a_total)
        dgate = computed_once(rounded(d * u * slope, gate_up, BY_HAND), NATIVE)
        dup = computed_once(rounded(d * active, gate_up, BY_HAND), NATIVE)
        tl.store(place, dgate, mask=mask)
        tl.store(place + WIDTH, dup, mask=mask)
        if GATE:
            here = tail + rows[:, None] * tail_stride + (gate_first + others)[None, :]
            t = operand(tl.load(here, mask=there & (others < gate_ranks)[None, :], other=0.0), INTERPRETED)
            gate_total = tl.dot(tl.trans(operand(dgate, INTERPRETED)), t, gate_total)
        if UP:
            here = tail + rows[:, None] * tail_stride + (up_first + others)[None, :]
            t = operand(tl.load(here, mask=there & (others < up_ranks)[None, :], other=0.0), INTERPRETED)
            up_total = tl.dot(tl.trans(operand(dup, INTERPRETED)), t, up_total)
    line = partial + split.to(tl.int64) * split_stride
    column = cols[:, None].to(tl.int64)
    there, ranks, others = (cols < WIDTH)[:, None], ranks[None, :], others[None, :]
    tl.store(line + a_slot + ranks * WIDTH + column, a_total, mask=there & (ranks < a_ranks))
    if GATE:
        slot = line + gate_slot + column * gate_ranks + others
        tl.store(slot, gate_total * gate_scaling, mask=there & (others < gate_ranks))
    if UP:
        slot = line + up_slot + column * up_ranks + others
        tl.store(slot, up_total * up_scaling, mask=there & (others < up_ranks))


HIDDEN = [
    {"BM": bm, "BK": bk, "num_warps": warps, "num_stages": 1}
    for bm, bk, warps in [(32, 128, 4), (16, 128, 4), (16, 256, 4), (32, 64, 4)]
]


@functools.cache
def _middle_options(rp: int, rt: int, drops: bool, device: torch.device) -> Options:
    # Fewer warps have less to wait for one another, more of them fill the multiprocessor.
    options = [(16, 64, 4, 3), (32, 64, 4, 2), (16, 64, 4, 2), (16, 32, 2, 3)]
    if max(rp, rt) > 32 or drops:
        options = [(32, 64, 8, 3), (16, 64, 4, 3)]
    elif tuning.family(device) == "hopper" and max(rp, rt) == 16:
        options = [(32, 64, 4, 2), (16, 64, 4, 3), (16, 64, 4, 2)]
    default, *more = [
        {"BM": bm, "BC": bc, "num_warps": w, "STAGES": loads_ahead((3 * bc + rp + 2 * rt) * bm * 2, most, device)}
        for bm, bc, w, most in options
    ]
    return default, more


RESIDENT = 4
"""Programs of ``middle`` that a multiprocessor holds at once; more take more registers than there are."""


def middle_parts(m: int, i: int, least: int, device: torch.device) -> int:
    """Among how many parts ``middle`` splits m rows of i numbers, from ``least`` to twice as many.

    All programs take the same time, so that the last turn of all multiprocessors should be a full one.
    """
    if interpreting() or m < 256 * 2 * least:
        return least
    slots = RESIDENT * tuning.multiprocessors(device)
    turns = {parts: cdiv(i, 64) * parts / slots for parts in range(least, 2 * least)}
    return max(turns, key=lambda parts: turns[parts] / -(-turns[parts] // 1))


def hidden(gate_up: Tensor, row: Tensor, packed: Tensor, kind: int, drop: Any) -> Tensor:
    """h in the left part of ``row``, ``h Aᵀ`` in its tail and, returned, by itself."""
    (m, twice), r, device = gate_up.shape, packed.shape[0], gate_up.device
    i = twice // 2
    rp = ranks_block(r)
    default, *more = HIDDEN
    tiling = tuning.settings("lora_hidden", device, (i, rp, kind, drop.p > 0), default=default, candidates=more)
    each, parts = column_share(m, i, tiling["BM"], tiling["BK"], device, 24)
    partial = dispatch.allocate((parts, m, r), torch.float32, device)
    launch(
        "lora_hidden", _hidden, (cdiv(m, tiling["BM"]), parts), device,
        gate_up, gate_up.stride(0), row, row.stride(0), partial, packed, *drop.arguments(gate_up), m, i, r, each,
        KIND=kind, DROP=drop.p > 0, RP=rp, BY_HAND=rounds_by_hand(gate_up.dtype), INTERPRETED=interpreting(),
        NATIVE=native(), **tiling,
    )  # fmt: skip
    return join(partial, row, i)


def middle(
    gate_up: Tensor, dh: Tensor, dlow: Tensor, packed: Tensor, a_ranks: int, tail: Tensor, partial: Tensor, a_slot: int,
    gate: tuple[int, int, int, float] | None, up: tuple[int, int, int, float] | None, kind: int, drop: Any,
) -> None:  # fmt: skip
    """The gradients of gate and up over gate and up, and each part's dA, dB of gate and dB of up into ``partial``.

    Args:
        dh: without the adapters' share. dlow: D. packed: A, ``[R, WIDTH]``, of which ``a_ranks`` are given.
        gate, up: of each adapter where its gradient goes, its first rank in ``tail``, how many it has, and its scaling.
    """
    (m, twice), r, device = gate_up.shape, packed.shape[0], gate_up.device
    i, parts = twice // 2, partial.shape[0]
    nothing = (0, 0, 0, 0.0)
    gate_slot, gate_first, gate_ranks, gate_scaling = gate or nothing
    up_slot, up_first, up_ranks, up_scaling = up or nothing
    rp, rt = ranks_block(r), ranks_block(max(gate_ranks, up_ranks))
    default, more = _middle_options(rp, rt, drop.p > 0, device)
    key = (i, rp, rt, kind, drop.p > 0)
    tiling = tuning.settings("lora_middle", device, key, default=default, candidates=more)
    launch(
        "lora_middle", _middle, (cdiv(i, tiling["BC"]), parts), device,
        gate_up, gate_up.stride(0), dh, dh.stride(0), dlow, dlow.stride(0), packed, tail, tail.stride(0),
        partial, partial.stride(0), a_slot, gate_slot, up_slot, *drop.arguments(gate_up), m, i, r,
        a_ranks, gate_ranks, up_ranks, gate_first, up_first, gate_scaling, up_scaling, share(m, parts, tiling["BM"]),
        KIND=kind, GATE=gate is not None, UP=up is not None, DROP=drop.p > 0, RP=rp, RT=rt,
        BY_HAND=rounds_by_hand(gate_up.dtype), INTERPRETED=interpreting(), NATIVE=native(),
        # triton's passes for the matrix units of 10.0 fail on the product turned over.
        LONG_SIDE=tuning.family(device) != "blackwell", **tiling,
    )  # fmt: skip
