"""Products of few rows with NF4 weights in Triton: what 4 bits stand for is looked up on the way to the product.

A product of few rows takes as long as its weight takes to be read, so the weight is read once, in 4 bits, and nothing
of it is written. Up to three weights with one input (q, k and v; gate and up) are one launch.

One row is summed up in fp32 from fp32 weights, scaled a block of values at a time. More rows are a matrix product: a
tile of the weight, rounded to the rows' dtype as an expanded weight would be, times the rows, added up in fp32; where a
weight has few outputs, by several programs each, whose sums a second launch adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, interpreting, launch, native
from ft_kernels.ops.lora.tiles import loads_ahead, operand
from ft_kernels.ops.nf4.kernels import quantiles, rounded, times
from ft_kernels.ops.nf4_linear.autograd import MOST_PARTS

__all__ = ["product"]

MOST_SHARES = 8
ADD = 512
"""Outputs that a program adds up, where several share a row."""


@triton.jit
def _part(
    tile, words0, absmax0, absmax20, code20, offset0, n0, words1, absmax1, absmax21, code21, offset1, n1,
    words2, absmax2, absmax22, code22, offset2, n2, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Which weight a tile belongs to, with its place there and the column of the output that the weight begins at."""
    words, absmax, second, code, offset, n, column = words0, absmax0, absmax20, code20, offset0, n0, n0 * 0
    if PARTS > 1:
        tiles = tl.cdiv(n0, ROWS)
        if tile >= tiles:
            words, absmax, second, code, offset, n = words1, absmax1, absmax21, code21, offset1, n1
            column = n0
            tile -= tiles
            if PARTS > 2:
                tiles = tl.cdiv(n1, ROWS)
                if tile >= tiles:
                    words, absmax, second, code, offset, n = words2, absmax2, absmax22, code22, offset2, n2
                    column = n0 + n1
                    tile -= tiles
    return words, absmax, second, code, offset, n, column, tile


@triton.jit
def _values(word, SHAPE: tl.constexpr):
    """The numbers that words of eight values stand for, in order: of a byte the high half comes first.

    Joined, not broadcast: what comes of a word stays with the thread that has the word.
    """
    byte = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))  # the last dimension is the bit of 8
    byte = tl.reshape(byte, [SHAPE // 2])
    number = tl.reshape(tl.join((byte >> 4) & 15, byte & 15), [SHAPE])
    return tl.gather(quantiles(), number, 0)


@triton.jit
def _scaled(number, second, code, offset, block, mask, NESTED: tl.constexpr, NATIVE: tl.constexpr):
    """The fp32 scales of blocks, from what is stored for them: 8-bit numbers, 2 to the NESTED to a scale of their own,
    or, where NESTED is negative, the scales themselves."""
    scale = number
    if NESTED >= 0:
        group = tl.load(second + (block >> NESTED), mask=mask, other=0.0)
        scale = times(tl.load(code + number.to(tl.int32)), group, NATIVE) + tl.load(offset)
    return scale


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def _one_row(
    x, y, words0, absmax0, absmax20, code20, offset0, n0, words1, absmax1, absmax21, code21, offset1, n1,
    words2, absmax2, absmax22, code22, offset2, n2,
    BLOCKS: tl.constexpr, WORDS: tl.constexpr, NESTED: tl.constexpr, NATIVE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs, from ACROSS blocks of each row at a time; a row has BLOCKS blocks of WORDS words."""
    words, absmax, second, code, offset, n, column, tile = _part(
        tl.program_id(0), words0, absmax0, absmax20, code20, offset0, n0, words1, absmax1, absmax21, code21, offset1,
        n1, words2, absmax2, absmax22, code22, offset2, n2, PARTS, ROWS,
    )  # fmt: skip
    rows = tile * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, ACROSS)
    inside = tl.arange(0, WORDS)
    there = rows < n
    first = rows[:, None] * BLOCKS + block[None, :]
    place = first[:, :, None] * WORDS + inside[None, None, :]
    mask = there[:, None] & (block < BLOCKS)[None, :]
    word = tl.load(words + place, mask=mask[:, :, None], other=0)
    number = tl.load(absmax + first, mask=mask, other=0)
    acc = tl.zeros((ROWS, ACROSS, WORDS), tl.float32)
    line = tl.arange(0, ACROSS * WORDS * 8)
    for start in range(0, BLOCKS, ACROSS):
        # What comes next is asked for before this is worked on.
        ahead = start + ACROSS
        more = there[:, None] & (block + ahead < BLOCKS)[None, :]
        next_word = tl.load(words + place + ahead * WORDS, mask=more[:, :, None], other=0)
        next_number = tl.load(absmax + first + ahead, mask=more, other=0)
        col = start * WORDS * 8 + line
        values = tl.load(x + col, mask=col < BLOCKS * WORDS * 8, other=0.0).to(tl.float32)
        codes = tl.reshape(_values(word, ROWS * ACROSS * WORDS * 8), [ROWS, ACROSS * WORDS * 8])
        products = tl.reshape(codes * values[None, :], [ROWS, ACROSS, WORDS, 8])
        scale = _scaled(number, second, code, offset, first + start, mask, NESTED, NATIVE)
        acc += tl.sum(products, 3) * scale[:, :, None]
        word = next_word
        number = next_number
        mask = more
    total = tl.sum(tl.sum(acc, 2), 1)
    tl.store(y + column + rows, rounded(total, y.dtype.element_ty, NATIVE), mask=there)


@triton.jit(do_not_specialize=["M", "n0", "n1", "n2"])
def _some_rows(
    x, x_stride, y, y_stride, M, words0, absmax0, absmax20, code20, offset0, n0,
    words1, absmax1, absmax21, code21, offset1, n1, words2, absmax2, absmax22, code22, offset2, n2,
    BLOCKS: tl.constexpr, WORDS: tl.constexpr, NESTED: tl.constexpr, NATIVE: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of TOKENS rows of x; the names are those of ``_one_row``, whose rows are the weight's.

    With several SHARES a program goes along one of so many parts of the weight's rows, and y has a plane for each.
    """
    words, absmax, second, code, offset, n, column, tile = _part(
        tl.program_id(0), words0, absmax0, absmax20, code20, offset0, n0, words1, absmax1, absmax21, code21, offset1,
        n1, words2, absmax2, absmax22, code22, offset2, n2, PARTS, ROWS,
    )  # fmt: skip
    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    block = tl.arange(0, ACROSS)
    inside = tl.arange(0, WORDS)
    there = rows < n
    first = rows[:, None] * BLOCKS + block[None, :]
    place = first[:, :, None] * WORDS + inside[None, None, :]
    share: tl.constexpr = (BLOCKS + ACROSS * SHARES - 1) // (ACROSS * SHARES) * ACROSS
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, BLOCKS)
    mask = there[:, None] & (block + begin < BLOCKS)[None, :]
    number = tl.load(absmax + first + begin, mask=mask, other=0)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    line = tl.arange(0, ACROSS * WORDS * 8)
    sources = x + tokens.to(tl.int64)[None, :] * x_stride
    for start in range(begin, end, ACROSS):
        ahead = start + ACROSS
        more = there[:, None] & (block + ahead < BLOCKS)[None, :]
        word = tl.load(words + place + start * WORDS, mask=mask[:, :, None], other=0)
        next_number = tl.load(absmax + first + ahead, mask=more, other=0)
        col = start * WORDS * 8 + line
        inputs = tl.load(
            sources + col[:, None],
            mask=(tokens < M)[None, :] & (col < BLOCKS * WORDS * 8)[:, None],
            other=0.0,
        )
        codes = tl.reshape(_values(word, ROWS * ACROSS * WORDS * 8), [ROWS, ACROSS, WORDS * 8])
        scale = _scaled(number, second, code, offset, first + start, mask, NESTED, NATIVE)
        weight = rounded(times(codes, scale[:, :, None], NATIVE), x.dtype.element_ty, NATIVE)
        weight = tl.reshape(weight, [ROWS, ACROSS * WORDS * 8])
        acc = tl.dot(operand(weight, INTERPRETED), operand(inputs, INTERPRETED), acc)
        number = next_number
        mask = more
    target = y + (tl.program_id(1) * M + tokens[None, :]).to(tl.int64) * y_stride + (column + rows)[:, None]
    tl.store(target, rounded(acc, y.dtype.element_ty, NATIVE), mask=there[:, None] & (tokens < M)[None, :])


@triton.jit
def _add_up(planes, y, COUNT, SHARES: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(planes + share * COUNT + i, mask=i < COUNT, other=0.0)
    tl.store(y + i, rounded(total, y.dtype.element_ty, NATIVE), mask=i < COUNT)


@cache
def _tiling(rows: int, k: int, tokens: int, outputs: int, device: torch.device) -> dict[str, Any]:
    """Where there are few outputs, programs share a row, so that every multiprocessor has four to choose from."""
    if rows == 1:
        return {"ROWS": 8, "ACROSS": 16, "num_warps": 4}
    tile = {"ROWS": 32, "ACROSS": 4 if tokens <= 32 else 2, "num_warps": 4}
    values = tile["ACROSS"] * 64  # of a row, of the usual blocks of 64
    shares = round(4 * tuning.multiprocessors(device) / cdiv(outputs, tile["ROWS"]))
    shares = max(1, min(shares, k // (4 * values), MOST_SHARES))
    return tile | {"SHARES": shares, "num_stages": loads_ahead(values * (2 * tokens + tile["ROWS"] // 2), 3, device)}


def _candidates(rows: int, tokens: int, device: torch.device) -> list[dict[str, Any]]:
    if rows == 1:
        sizes = ((4, 16, 2), (4, 16, 4), (8, 8, 2), (8, 16, 4), (8, 16, 8), (16, 16, 8))
        return [{"ROWS": r, "ACROSS": a, "num_warps": w} for r, a, w in sizes]
    tiles = (
        (16, 4, 1, 4, 5), (16, 4, 2, 2, 4), (32, 4, 1, 4, 5), (32, 4, 2, 4, 4), (32, 4, 4, 4, 3), (32, 4, 8, 4, 3),
        (64, 4, 4, 8, 3), (64, 2, 4, 4, 3),
    )  # fmt: skip
    return [
        {"ROWS": r, "ACROSS": a, "SHARES": shares, "num_warps": w, "num_stages": s}
        for r, a, shares, w, s in tiles
        if s <= loads_ahead(a * 64 * (2 * tokens + r // 2), s, device)
    ]


def product(
    x: Tensor, parts: Sequence[Sequence[Tensor]], sizes: Sequence[int], blocksize: int, nested_blocksize: int
) -> Tensor:
    """``x`` times the transposed weights, side by side: ``[M, sum of N]`` in x's dtype.

    Args:
        x: ``[M, K]``, fp16 or bf16, the last dimension contiguous; K a multiple of the blocksize.
        parts: of one to three weights ``[N, K]``: the bytes, absmax, absmax2, code2 and offset as
            ``ops.nf4.kernels.dequantize`` takes them (absmax three more times where it is not nested).
        sizes: each weight's N.
        blocksize: values to a scale.
        nested_blocksize: scales to a scale of theirs; 0 where scales are fp32.
    """
    m, k = x.shape
    outputs = sum(sizes)
    y = dispatch.allocate((m, outputs), x.dtype, x.device)
    given: list[Any] = []
    for (packed, *tables), size in zip(parts, sizes, strict=True):
        given += [packed.view(torch.int32), *tables, size]
    given += given[-6:] * (MOST_PARTS - len(parts))
    constants = {
        "BLOCKS": k // blocksize, "WORDS": blocksize // 8, "NESTED": nested_blocksize.bit_length() - 1,
        "NATIVE": native(), "PARTS": len(parts),
    }  # fmt: skip
    tokens = max(16, dispatch.power_of_2(m))
    name = "nf4_linear_one" if m == 1 else "nf4_linear_some"
    settings = tuning.settings(
        name, x.device, (k, outputs, len(parts), blocksize, tokens, x.dtype),
        default=_tiling(min(m, 2), k, tokens, outputs, x.device),
        candidates=lambda: _candidates(m, tokens, x.device),
    )  # fmt: skip
    tiles = sum(cdiv(size, settings["ROWS"]) for size in sizes)
    if m == 1:
        launch(name, _one_row, (tiles,), x.device, x, y, *given, **constants, **settings)
        return y
    shares = settings["SHARES"]
    planes = y if shares == 1 else dispatch.allocate((shares, m, outputs), torch.float32, x.device)
    launch(
        name, _some_rows, (tiles, shares), x.device, x, x.stride(0), planes, outputs, m, *given,
        **constants, INTERPRETED=interpreting(), TOKENS=tokens, **settings,
    )  # fmt: skip
    if shares > 1:
        launch(
            "nf4_linear_add", _add_up, (cdiv(m * outputs, ADD),), x.device,
            planes, y, m * outputs, SHARES=shares, NATIVE=native(), BLOCK=ADD, num_warps=4,
        )  # fmt: skip
    return y
