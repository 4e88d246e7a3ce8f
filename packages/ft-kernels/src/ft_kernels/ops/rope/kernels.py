"""Rotary position embedding in Triton, queries and keys in one launch.

A pair (a, b) at angle θ becomes (a·cos θ − b·sin θ, b·cos θ + a·sin θ), in fp32, or in fp64 for fp32 tensors; the
gradient is turned back by −θ. A program takes some heads of some tokens, reads all it needs before it writes, and may
therefore write in place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, launch, power_of_2

__all__ = ["rotate"]

TILE = 4096
"""Elements of the queries that a program works on."""


@triton.jit
def _load_pairs(start, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.load(start + cols, mask=mask & (cols < 2 * PAIRS), other=0.0).to(WIDE)
        first, second = tl.split(tl.reshape(both, (both.shape[0], both.shape[1], BLOCK, 2)))
    else:
        cols = tl.arange(0, BLOCK)[None, None, :]
        there = mask & (cols < PAIRS)
        first = tl.load(start + cols, mask=there, other=0.0).to(WIDE)
        second = tl.load(start + (PAIRS + cols), mask=there, other=0.0).to(WIDE)
    return first, second


@triton.jit
def _store_pairs(start, first, second, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1], 2 * BLOCK))
        tl.store(start + cols, both.to(start.dtype.element_ty), mask=mask & (cols < 2 * PAIRS))
    else:
        cols = tl.arange(0, BLOCK)[None, None, :]
        there = mask & (cols < PAIRS)
        tl.store(start + cols, first.to(start.dtype.element_ty), mask=there)
        tl.store(start + (PAIRS + cols), second.to(start.dtype.element_ty), mask=there)


@triton.jit
def _head_starts(base, batch, place, heads, batch_stride, token_stride, head_stride):
    tokens = batch * batch_stride + place * token_stride
    return base + tokens[:, None, None] + (heads * head_stride)[None, :, None]


@triton.jit
def _copy_rest(source, target, mask, FIRST: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr):
    cols = FIRST + tl.arange(0, REST_BLOCK)[None, None, :]
    there = mask & (cols < FIRST + REST)
    tl.store(target + cols, tl.load(source + cols, mask=there, other=0.0), mask=there)


@triton.jit
def _rotate(
    q, q_batch_stride, q_token_stride, q_head_stride, k, k_batch_stride, k_token_stride, k_head_stride,
    q_out, qo_batch_stride, qo_token_stride, qo_head_stride, k_out, ko_batch_stride, ko_token_stride, ko_head_stride,
    cos, sin, table_stream_stride, table_batch_stride, table_token_stride, table_pair_stride, table_rows,
    positions, p_stream_stride, p_batch_stride, p_token_stride,
    N, S, q_heads, k_heads, end0, end1, end2,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SECTIONS: tl.constexpr, WIDE: tl.constexpr,
    TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = tokens < N
    batch = tokens // S
    place = tokens % S
    pairs = tl.arange(0, BLOCK)

    q_numbers = (tl.program_id(1) * Q_HEADS + tl.arange(0, Q_HEADS)).to(tl.int64)
    k_numbers = (tl.program_id(1) * K_HEADS + tl.arange(0, K_HEADS)).to(tl.int64)
    q_mask = there[:, None, None] & (q_numbers < q_heads)[None, :, None]
    k_mask = there[:, None, None] & (k_numbers < k_heads)[None, :, None]
    q_start = _head_starts(q, batch, place, q_numbers, q_batch_stride, q_token_stride, q_head_stride)
    k_start = _head_starts(k, batch, place, k_numbers, k_batch_stride, k_token_stride, k_head_stride)
    q_first, q_second = _load_pairs(q_start, q_mask, PAIRS, INTERLEAVED, BLOCK, WIDE)
    k_first, k_second = _load_pairs(k_start, k_mask, PAIRS, INTERLEAVED, BLOCK, WIDE)

    if SECTIONS == 0:
        streams = tl.zeros((1, BLOCK), tl.int64)
    elif SECTIONS == 1:  # in blocks
        streams = ((pairs >= end0).to(tl.int64) + (pairs >= end1).to(tl.int64) + (pairs >= end2).to(tl.int64))[None, :]
    else:  # interleaved
        second_stream = (pairs % 3 == 1) & (pairs < end1)
        third_stream = (pairs % 3 == 2) & (pairs < end2)
        streams = (second_stream.to(tl.int64) + 2 * third_stream.to(tl.int64))[None, :]
    known = there[:, None] & (pairs < PAIRS)[None, :]
    if HAS_POSITIONS:
        slots = (batch * p_batch_stride + place * p_token_stride)[:, None]
        if SECTIONS == 0:
            rows = tl.load(positions + slots, mask=there[:, None], other=0).to(tl.int64)
        else:
            rows = tl.load(positions + slots + streams * p_stream_stride, mask=known, other=0).to(tl.int64)
        known = known & (rows >= 0) & (rows < table_rows)
        slots = rows * table_token_stride
    else:
        slots = (batch * table_batch_stride + place * table_token_stride)[:, None] + streams * table_stream_stride
    slots += (pairs * table_pair_stride)[None, :]
    # A position that is not in the table cannot be reported from here: it gives nan.
    c = tl.load(cos + slots, mask=known, other=float("nan")).to(WIDE)[:, None, :]
    s = tl.load(sin + slots, mask=known, other=float("nan")).to(WIDE)[:, None, :]
    if BACK:
        s = -s

    q_target = _head_starts(q_out, batch, place, q_numbers, qo_batch_stride, qo_token_stride, qo_head_stride)
    k_target = _head_starts(k_out, batch, place, k_numbers, ko_batch_stride, ko_token_stride, ko_head_stride)
    turned, other = q_first * c - q_second * s, q_second * c + q_first * s
    _store_pairs(q_target, turned, other, q_mask, PAIRS, INTERLEAVED, BLOCK)
    turned, other = k_first * c - k_second * s, k_second * c + k_first * s
    _store_pairs(k_target, turned, other, k_mask, PAIRS, INTERLEAVED, BLOCK)
    if REST:
        _copy_rest(q_start, q_target, q_mask, 2 * PAIRS, REST, REST_BLOCK)
        _copy_rest(k_start, k_target, k_mask, 2 * PAIRS, REST, REST_BLOCK)


@functools.cache
def _tiling(q_heads: int, k_heads: int, d: int) -> dict[str, Any]:
    """Launch settings: 16 to 32 elements of the queries a thread; the keys come with them, as many parts of them."""
    parts = cdiv(max(q_heads, k_heads) * d, 2 * TILE)
    q_block, k_block = (power_of_2(max(1, cdiv(heads, parts))) for heads in (q_heads, k_heads))
    elements = max(q_block, k_block) * power_of_2(d)
    tokens = max(1, TILE // elements)
    return {
        "TOKENS": tokens,
        "Q_HEADS": q_block,
        "K_HEADS": k_block,
        "num_warps": min(8, max(4, tokens * elements // 1024)),
    }


def _candidates(default: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = {default["TOKENS"], 2 * default["TOKENS"]}
    return [default | {"TOKENS": t, "num_warps": w} for t in sorted(tokens) for w in (2, 4, 8)]


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    sections: Sequence[int] = (),
    interleaved: bool = False,
    interleaved_sections: bool = False,
    back: bool = False,
    inplace: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn q and k, into new memory (contiguous), into ``out`` or where they are.

    Args:
        q, k: ``[B, S, heads, D]``, any strides; each its own number of heads and dtype.
        cos, sin: ``[streams, B, S, pairs]``, one stream or as many as sections, or with positions ``[P, pairs]``; any
            strides, zero too.
        positions: ``[streams, B, S]`` integers, rows of cos and sin.
        sections: pairs turned by each stream; empty where there is one.
        interleaved: whether pairs are neighbours, ``(0, 1), (2, 3), …``, and not ``(0, pairs), (1, pairs + 1), …``.
        interleaved_sections: how streams share the pairs, see ``reference.streams_of_pairs``.
        back: turn by the negative angle. This is the backward pass, with the gradients for q and k.
        inplace: write the result over q and k; the dimensions after the pairs are then not touched at all.
        out: where to write, of any strides but for the last dimension, which is contiguous.
    """
    outs = out or ((q, k) if inplace else tuple(dispatch.allocate(t.shape, t.dtype, t.device) for t in (q, k)))
    if q.numel() + k.numel() == 0:
        return outs[0], outs[1]
    sources = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q, k)]
    written = sources if inplace else outs
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batches, length, q_heads, d = q.shape
    k_heads, pairs = k.shape[2], cos.shape[-1]
    rows, table, places = 0, cos.stride(), [0, 0, 0]
    if positions is not None:
        rows, table, places = cos.shape[0], (0, 0, *cos.stride()), list(positions.stride())
    ends = [sum(sections[: i + 1]) for i in range(len(sections))] + 3 * [pairs]
    if interleaved_sections:
        ends = [0, 3 * sections[1], 3 * sections[2]]
    rest = 0 if inplace else d - 2 * pairs
    default = _tiling(q_heads, k_heads, d)
    name = "rope_backward" if back else "rope"
    key = (q_heads, k_heads, d, pairs, interleaved, q.dtype)
    tiling = tuning.settings(name, q.device, key, default=default, candidates=lambda: _candidates(default))
    parts = max(cdiv(q_heads, tiling["Q_HEADS"]), cdiv(k_heads, tiling["K_HEADS"]))
    launch(
        name, _rotate, (cdiv(batches * length, tiling["TOKENS"]), parts), q.device,
        sources[0], *sources[0].stride()[:3], sources[1], *sources[1].stride()[:3],
        written[0], *written[0].stride()[:3], written[1], *written[1].stride()[:3],
        cos, sin, *table, rows, cos if positions is None else positions, *places,
        batches * length, length, q_heads, k_heads, *ends[:3],
        PAIRS=pairs, REST=rest, INTERLEAVED=interleaved, BACK=back, HAS_POSITIONS=positions is not None,
        SECTIONS=(2 if interleaved_sections else 1) if sections else 0,
        WIDE=tl.float64 if q.dtype == k.dtype == torch.float32 else tl.float32,
        BLOCK=power_of_2(pairs), REST_BLOCK=power_of_2(max(1, rest)), **tiling,
    )  # fmt: skip
    if inplace:
        for original, turned in zip((q, k), written, strict=True):
            if turned is not original:
                original.copy_(turned)
    return outs[0], outs[1]
