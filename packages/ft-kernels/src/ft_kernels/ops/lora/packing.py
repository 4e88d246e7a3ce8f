"""What stands on the weight's side of a product with low-rank updates, in Triton: A and S in the products' dtype.

S goes straight into the columns beside W, A into memory of its own. Two products of a block are packed in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.dispatch import cdiv, launch
from ft_kernels.ops.lora.kernels import three
from ft_kernels.ops.lora.tiles import ranks_block, rounded, rounds_by_hand

__all__ = ["pack", "pack_two"]


@triton.jit
def _pack(
    pid, a0, a1, a2, b0, b1, b2, packed, columns, column_stride, K, N, R, a_programs,
    start0, start1, start2, n0, n1, n2, r0, r1, r2, s0, s1, s2,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RP: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    if pid < a_programs:
        blocks = tl.cdiv(K, BLOCK)
        row = pid // blocks
        cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
        there = cols < K
        value = tl.load(a0 + row * K + cols, mask=there & (row < r0), other=0.0).to(tl.float32)
        if COUNT > 1:
            mine = there & (row >= r0) & (row < r0 + r1)
            value += tl.load(a1 + (row - r0) * K + cols, mask=mine, other=0.0).to(tl.float32)
        if COUNT > 2:
            mine = there & (row >= r0 + r1) & (row < r0 + r1 + r2)
            value += tl.load(a2 + (row - r0 - r1) * K + cols, mask=mine, other=0.0).to(tl.float32)
        tl.store(packed + row * K + cols, rounded(value, packed, BY_HAND), mask=there)
    else:
        n = ((pid - a_programs) * ROWS + tl.arange(0, ROWS))[:, None]
        rank = tl.arange(0, RP)[None, :]
        its = (n >= start0) & (n < start0 + n0) & (rank < r0)
        number = tl.load(b0 + (n - start0) * r0 + rank, mask=its, other=0.0).to(tl.float32) * s0
        if COUNT > 1:
            its = (n >= start1) & (n < start1 + n1) & (rank >= r0) & (rank < r0 + r1)
            number += tl.load(b1 + (n - start1) * r1 + rank - r0, mask=its, other=0.0).to(tl.float32) * s1
        if COUNT > 2:
            its = (n >= start2) & (n < start2 + n2) & (rank >= r0 + r1) & (rank < r0 + r1 + r2)
            number += tl.load(b2 + (n - start2) * r2 + rank - r0 - r1, mask=its, other=0.0).to(tl.float32) * s2
        slot = columns + n.to(tl.int64) * column_stride + rank
        tl.store(slot, rounded(number, columns, BY_HAND), mask=(n < N) & (rank < R))


@triton.jit
def _pack_one(
    a0, a1, a2, b0, b1, b2, packed, columns, column_stride, K, N, R, a_programs,
    start0, start1, start2, n0, n1, n2, r0, r1, r2, s0, s1, s2,
    COUNT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    _pack(
        tl.program_id(0), a0, a1, a2, b0, b1, b2, packed, columns, column_stride, K, N, R, a_programs,
        start0, start1, start2, n0, n1, n2, r0, r1, r2, s0, s1, s2, COUNT, BLOCK, ROWS, RP, BY_HAND,
    )  # fmt: skip


@triton.jit
def _pack_two(
    a0, a1, a2, b0, b1, b2, packed, columns, column_stride, K, N, R, a_programs,
    start0, start1, start2, n0, n1, n2, r0, r1, r2, s0, s1, s2,
    a3, a4, a5, b3, b4, b5, packed_2, columns_2, column_stride_2, K_2, N_2, R_2, a_programs_2,
    start3, start4, start5, n3, n4, n5, r3, r4, r5, s3, s4, s5,
    COUNT: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
    COUNT_2: tl.constexpr, RP_2: tl.constexpr, ROWS_2: tl.constexpr,
    BLOCK: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = a_programs + tl.cdiv(N, ROWS)
    if pid < programs:
        _pack(
            pid, a0, a1, a2, b0, b1, b2, packed, columns, column_stride, K, N, R, a_programs,
            start0, start1, start2, n0, n1, n2, r0, r1, r2, s0, s1, s2, COUNT, BLOCK, ROWS, RP, BY_HAND,
        )  # fmt: skip
    else:
        _pack(
            pid - programs, a3, a4, a5, b3, b4, b5, packed_2, columns_2, column_stride_2, K_2, N_2, R_2, a_programs_2,
            start3, start4, start5, n3, n4, n5, r3, r4, r5, s3, s4, s5, COUNT_2, BLOCK, ROWS_2, RP_2, BY_HAND,
        )  # fmt: skip


PACKED = 2048
"""Numbers of A that a program packs."""


@dataclass(eq=False)
class _Packing:
    """One product's part of a launch."""

    packed: Tensor
    programs: int
    args: list[Any]
    constants: dict[str, int]


def _packing(low: Any, k: int, columns: Tensor) -> _Packing:
    device, r, n = columns.device, low.padded, columns.shape[0]
    a = [t.contiguous() for t in low.a]
    b = [t.contiguous() for t in low.b]
    plain = len(a) == 1 and low.r == r and a[0].dtype == columns.dtype
    packed = a[0] if plain else dispatch.allocate((r, k), columns.dtype, device)
    rp = ranks_block(r)
    tile = max(1, 4096 // rp)
    a_programs = 0 if plain else r * cdiv(k, PACKED)
    args = [
        *three(a, a[0]), *three(b, b[0]), packed, columns, columns.stride(0), k, n, r, a_programs,
        *three(low.starts, 0), *three(low.sizes, 0), *three(low.ranks, 0), *three(low.scaling, 0.0),
    ]  # fmt: skip
    return _Packing(packed, a_programs + cdiv(n, tile), args, {"COUNT": len(a), "RP": rp, "ROWS": tile})


def pack(low: Any, k: int, columns: Tensor) -> Tensor:
    """A, stacked to ``[low.padded, K]`` in the dtype of ``columns [N, low.padded]``, which get S."""
    one = _packing(low, k, columns)
    launch(
        "lora_pack", _pack_one, (one.programs,), columns.device, *one.args,
        **one.constants, BLOCK=PACKED, BY_HAND=rounds_by_hand(columns.dtype), num_warps=4,
    )  # fmt: skip
    return one.packed


def pack_two(lows: Sequence[Any], ks: Sequence[int], columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """:func:`pack` of two products whose columns have one dtype, in one launch."""
    one, two = (_packing(*given) for given in zip(lows, ks, columns, strict=True))
    second = {f"{name}_2": value for name, value in two.constants.items()}
    launch(
        "lora_pack", _pack_two, (one.programs + two.programs,), columns[0].device, *one.args, *two.args,
        **one.constants, **second, BLOCK=PACKED, BY_HAND=rounds_by_hand(columns[0].dtype), num_warps=4,
    )  # fmt: skip
    return one.packed, two.packed
