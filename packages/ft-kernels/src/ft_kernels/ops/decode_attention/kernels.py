"""Attention of one token over kept ones in Triton: Flash-Decoding (Dao et al. 2023).

A program takes one head of keys and values, all query heads that read it, and a part of the sequence: for one token
there are too few heads to keep a card busy. The parts are as many as the launch says and divide what a row has just
now, so that the launch depends on nothing that is known to the device alone. A second, small kernel adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, launch, power_of_2
from ft_kernels.ops.lora.tiles import dot_dtype, rounded, rounds_by_hand

__all__ = ["append", "attention"]

LOG2E = 1.4426950408889634
TOKENS = 64
"""Tokens that are worked on at a time."""
MOST_PARTS = 64


@triton.jit(do_not_specialize=["S", "window"])
def _parts(
    q, q_row, q_head, keys, k_row, k_token, k_head, values, v_row, v_token, v_head, lengths, sums, marks, S, window,
    factor, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A part's weighted sum of values, over its sum of weights, and the logarithm of that to base 2."""
    row = (tl.program_id(0) // (HEADS // GROUP)).to(tl.int64)
    group = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)  # heads may lie far apart
    part = tl.program_id(1)
    end = tl.minimum(tl.load(lengths + row), S)
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    # Parts are whole blocks, but for the last one.
    share = tl.cdiv(tl.cdiv(end - begin, N), PARTS) * N
    lo = begin + part * share
    hi = tl.minimum(lo + share, end)
    heads = tl.arange(0, M)
    cols = tl.arange(0, BLOCK_D)
    mine = (heads < GROUP)[:, None] & (cols < D)[None, :]
    query = tl.load(q + row * q_row + (group * GROUP + heads)[:, None] * q_head + cols[None, :], mask=mine, other=0.0)
    query = query.to(DOT)
    k = keys + row * k_row + group * k_head
    v = values + row * v_row + group * v_head
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, BLOCK_D), tl.float32)
    for start in range(lo, hi, N):
        tokens = start + tl.arange(0, N)
        there = (tokens < hi)[:, None] & (cols < D)[None, :]
        key = tl.load(k + tokens.to(tl.int64)[:, None] * k_token + cols[None, :], mask=there, other=0.0).to(DOT)
        value = tl.load(v + tokens.to(tl.int64)[:, None] * v_token + cols[None, :], mask=there, other=0.0).to(DOT)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        scores = tl.where((tokens < hi)[None, :], scores, float("-inf"))
        larger = tl.maximum(m, tl.max(scores, 1))  # a block has at least one token, so this is a number
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(m - larger)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), value, acc * shrink[:, None], input_precision="ieee")
        m = larger
    head = row * HEADS + group * GROUP + heads
    empty = total == 0.0  # a part of no tokens
    total = tl.where(empty, 1.0, total)
    mark = tl.where(empty, float("-inf"), m + tl.log2(total))
    place = (head * PARTS + part)[:, None] * D + cols[None, :]
    tl.store(sums + place, acc / total[:, None], mask=mine)
    tl.store(marks + head * PARTS + part, mark, mask=heads < GROUP)


@triton.jit
def _together(
    sums, marks, out, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
    BY_HAND: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK_PARTS)
    cols = tl.arange(0, BLOCK_D)
    mark = tl.load(marks + head * PARTS + parts, mask=parts < PARTS, other=float("-inf"))
    largest = tl.max(mark, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # a row of no tokens gives zeros
    weight = tl.exp2(mark - largest)
    place = (head * PARTS + parts)[:, None] * D + cols[None, :]
    there = (parts < PARTS)[:, None] & (cols < D)[None, :]
    total = tl.sum(weight, 0)
    total = tl.where(total == 0.0, 1.0, total)
    result = tl.sum(tl.load(sums + place, mask=there, other=0.0) * weight[:, None], 0) / total
    target = out + head * D + cols
    tl.store(target, rounded(result, out, BY_HAND), mask=cols < D)


@triton.jit(do_not_specialize=["S", "P"])
def _append(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, out, keys, key_row, key_token, key_head,
    values, value_row, value_token, value_head, positions, cos, cos_row, sin, sin_row, S, P,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v of one row: turned, or copied, to where it goes."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    there = pairs < PAIRS
    position = tl.load(positions + row)
    known = (position >= 0) & (position < S) & (position < P)
    place = tl.where(known, position, 0).to(tl.int64)
    if head < HEADS:
        source = q + row * q_row + head * q_head
        target = out + (row * HEADS + head) * (2 * PAIRS)
        write = there
    elif head < HEADS + GROUPS:
        source = k + row * k_row + (head - HEADS) * k_head
        target = keys + row * key_row + place * key_token + (head - HEADS) * key_head
        write = there & known
    else:
        source = v + row * v_row + (head - HEADS - GROUPS) * v_head
        target = values + row * value_row + place * value_token + (head - HEADS - GROUPS) * value_head
        write = there & known
    first = tl.load(source + pairs, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + PAIRS + pairs, mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + place * cos_row + pairs, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + place * sin_row + pairs, mask=there, other=0.0).to(tl.float32)
    turned = head < HEADS + GROUPS
    a = tl.where(turned, first * c - second * s, first)
    b = tl.where(turned, second * c + first * s, second)
    tl.store(target + pairs, rounded(a, out, BY_HAND), mask=write)
    tl.store(target + PAIRS + pairs, rounded(b, out, BY_HAND), mask=write)


def append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The turned queries ``[B, H, D]``; the arguments are :func:`ft_kernels.rope_append`'s."""
    b, heads, d = q.shape
    groups = k.shape[1]
    out = dispatch.allocate(q.shape, q.dtype, q.device)
    launch(
        "rope_append", _append, (b, heads + 2 * groups), q.device,
        q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], out, keys, *keys.stride()[:3],
        values, *values.stride()[:3], positions, cos, cos.stride(0), sin, sin.stride(0), keys.shape[1], cos.shape[0],
        HEADS=heads, GROUPS=groups, PAIRS=d // 2, BLOCK=power_of_2(d // 2), BY_HAND=rounds_by_hand(q.dtype),
        num_warps=1,
    )  # fmt: skip
    return out


def attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    """``[B, H, D]``; the arguments are :func:`ft_kernels.decode_attention`'s, with window 0 for none."""
    b, heads, d = q.shape
    s, groups = keys.shape[1:3]
    device = q.device
    most = cdiv(min(window or s, s), TOKENS)
    parts = max(1, min(most, MOST_PARTS, cdiv(2 * tuning.multiprocessors(device), b * groups)))
    out = dispatch.allocate(q.shape, q.dtype, device)
    sums = dispatch.allocate((b, heads, parts, d), torch.float32, device)
    marks = dispatch.allocate((b, heads, parts), torch.float32, device)
    block_d = max(16, power_of_2(d))
    group = heads // groups
    launch(
        "decode_attention_parts", _parts, (b * groups, parts), device,
        q, q.stride(0), q.stride(1), keys, *keys.stride()[:3], values, *values.stride()[:3], lengths, sums, marks, s,
        window, scale * LOG2E,
        HEADS=heads, GROUP=group, D=d, PARTS=parts, BLOCK_D=block_d, M=max(16, power_of_2(group)), N=TOKENS,
        DOT=dot_dtype(q),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    launch(
        "decode_attention_together", _together, (b * heads,), device,
        sums, marks, out, D=d, PARTS=parts, BLOCK_PARTS=power_of_2(parts), BLOCK_D=block_d,
        BY_HAND=rounds_by_hand(q.dtype), num_warps=4 if parts * block_d >= 2048 else 1,
    )  # fmt: skip
    return out
