"""Packed attention in Triton: FlashAttention-2 (Dao 2023, arXiv:2307.08691) over one row of documents.

A query sees an interval of keys, and no interval begins or ends before that of an earlier query. Documents, causality
and a window are all in the intervals (see plan.py), so one kernel serves every mask and nothing waits for the host.
Blocks of keys that all queries of a tile see are computed without a mask.

The gradients are those of FlashAttention-2: with p = exp(s − lse) and D = Σ dO·O,

    dV = pᵀ·dO        dS = p·(dO·Vᵀ − D)·(1 − (s / cap)²)        dQ = scale·dS·K        dK = scale·dSᵀ·Q

where lse counts the sink, a column of scores without a value, whose gradient is −Σ exp(sink − lse)·D.

O is rounded to 16 bits, and with it D, whose error is one number for all of a row's dS: it adds up where those cancel,
in the gradients of biases of q and k. EXACT takes D = Σ p·(dO·Vᵀ) instead, in one more pass over the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import cdiv, interpreting, launch, power_of_2
from ft_kernels.ops.lora.tiles import dot_dtype
from ft_kernels.ops.packed_attention.parts import load, tanh
from ft_kernels.ops.packed_attention.tiles import tiles

__all__ = ["backward", "delta", "forward"]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward_blocks(
    acc, m, total, q, k, v, k_stride, v_stride, row_lo, row_hi, begin, end, one, gap, T, factor, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, N):
        cols = tl.where(start < one, start, start + gap) + tl.arange(0, N)
        keys = load(k, cols, cols < T, k_stride, D, BLOCK_D, MASK, DOT)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
        if SOFTCAP:
            scores = tanh(scores) * (softcap * LOG2E)
        if MASK:
            seen = (cols[None, :] >= row_lo[:, None]) & (cols[None, :] <= row_hi[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(m, tl.max(scores, 1))
        # A row may see nothing of a masked block, and nothing before it: −inf − −inf would be nan.
        base = tl.where(larger == float("-inf"), 0.0, larger) if MASK else larger
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(weights, 1)
        values = load(v, cols, cols < T, v_stride, D, BLOCK_D, MASK, DOT)
        acc = tl.dot(weights.to(DOT), values, acc * shrink[:, None], input_precision="ieee")
        m = larger
    return acc, m, total


@triton.jit(do_not_specialize=["T"])
def _forward(
    q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, out, lse, intervals, sinks, T, HEADS, GROUP,
    factor, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # The last tiles first: under a causal mask they are the longest.
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS
    head = tl.program_id(0) % HEADS
    rows = tile * M + tl.arange(0, M)
    there = rows < T
    final = tl.minimum(tile * M + M, T) - 1
    row_lo = tl.load(intervals + rows, mask=there, other=0)
    row_hi = tl.load(intervals + T + rows, mask=there, other=-1)
    lowest = tl.load(intervals + tile * M)
    whole_from = tl.load(intervals + final)
    whole_to = tl.load(intervals + T + tile * M) + 1
    highest = tl.load(intervals + T + final) + 1
    # The blocks from `one` on, `gap` tokens of them, are seen whole by every row; those before and behind are masked.
    begin = lowest // N * N
    one = tl.minimum(tl.cdiv(whole_from, N) * N, tl.cdiv(highest, N) * N)
    gap = tl.maximum(whole_to // N * N - one, 0)
    q += head.to(tl.int64) * q_head
    k += (head // GROUP).to(tl.int64) * k_head
    v += (head // GROUP).to(tl.int64) * v_head
    queries = load(q, rows, there, q_stride, D, BLOCK_D, True, DOT)
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, BLOCK_D), tl.float32)
    acc, m, total = _forward_blocks(
        acc, m, total, queries, k, v, k_stride, v_stride, row_lo, row_hi, begin, highest - gap, one, gap, T, factor,
        softcap, D, BLOCK_D, N, True, SOFTCAP, DOT,
    )  # fmt: skip
    acc, m, total = _forward_blocks(
        acc, m, total, queries, k, v, k_stride, v_stride, row_lo, row_hi, one, one + gap, one, 0, T, factor,
        softcap, D, BLOCK_D, N, False, SOFTCAP, DOT,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        larger = tl.maximum(m, sink)
        shrink = tl.exp2(m - larger)
        total = total * shrink + tl.exp2(sink - larger)
        acc = acc * shrink[:, None]
        m = larger
    total = tl.where(there, total, 1.0)
    cols = tl.arange(0, BLOCK_D)
    place = out + (rows.to(tl.int64) * HEADS + head)[:, None] * D + cols[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=there[:, None] & (cols < D)[None, :])
    tl.store(lse + head.to(tl.int64) * T + rows, (m + tl.log2(total)) * LN2, mask=there)


@triton.jit(do_not_specialize=["T"])
def _delta(
    grad, grad_stride, grad_head, out, out_stride, out_head, delta, T, HEADS, D,
    M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) // HEADS * M + tl.arange(0, M)
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    up = load(grad + head * grad_head, rows, rows < T, grad_stride, D, BLOCK_D, True, tl.float32)
    result = load(out + head * out_head, rows, rows < T, out_stride, D, BLOCK_D, True, tl.float32)
    tl.store(delta + head * T + rows, tl.sum(up * result, 1), mask=rows < T)


@triton.jit
def _weights(scores, base, row_lo, row_hi, cols, factor, softcap, MASK: tl.constexpr, SOFTCAP: tl.constexpr):
    """The weights, and by what the scores' gradient is multiplied for the products' (the softcap's slope)."""
    scores = scores * factor
    slope = scores
    if SOFTCAP:
        capped = tanh(scores)
        slope = 1.0 - capped * capped
        scores = capped * (softcap * LOG2E)
    weights = tl.exp2(scores - base)
    if MASK:
        weights = tl.where((cols >= row_lo) & (cols <= row_hi), weights, 0.0)
    return weights, slope


@triton.jit
def _key_blocks(
    dk, dv, keys, values, q, q_stride, grad, grad_stride, lse, delta, intervals, cols, begin, end, one, gap, T, factor,
    softcap, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, M):
        rows = tl.where(start < one, start, start + gap) + tl.arange(0, M)
        queries = load(q, rows, rows < T, q_stride, D, BLOCK_D, MASK, DOT)
        up = load(grad, rows, rows < T, grad_stride, D, BLOCK_D, MASK, DOT)
        if MASK:
            row_lo = tl.load(intervals + rows, mask=rows < T, other=0)[None, :]
            row_hi = tl.load(intervals + T + rows, mask=rows < T, other=-1)[None, :]
            base = tl.load(lse + rows, mask=rows < T, other=0.0)[None, :] * LOG2E
            product = tl.load(delta + rows, mask=rows < T, other=0.0)[None, :]
        else:
            row_lo = 0
            row_hi = 0
            base = tl.load(lse + rows)[None, :] * LOG2E
            product = tl.load(delta + rows)[None, :]
        # Everything transposed, [keys, queries], so that no product needs its left side transposed in registers.
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        weights, slope = _weights(scores, base, row_lo, row_hi, cols[:, None], factor, softcap, MASK, SOFTCAP)
        dv = tl.dot(weights.to(DOT), up, dv, input_precision="ieee")
        dscores = weights * (tl.dot(values, tl.trans(up), input_precision="ieee") - product)
        if SOFTCAP:
            dscores = dscores * slope
        dk = tl.dot(dscores.to(DOT), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def _backward_keys(
    q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, grad, grad_stride, grad_head, lse, delta, intervals,
    dk, dv, T, KEY_HEADS, GROUP, scale, factor, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // KEY_HEADS
    key_head = tl.program_id(0) % KEY_HEADS
    cols = tile * N + tl.arange(0, N)
    there = cols < T
    final = tl.minimum(tile * N + N, T) - 1
    lowest = tl.load(intervals + 2 * T + tile * N)
    whole_from = tl.load(intervals + 2 * T + final)
    whole_to = tl.load(intervals + 3 * T + tile * N) + 1
    highest = tl.load(intervals + 3 * T + final) + 1
    begin = lowest // M * M
    one = tl.minimum(tl.cdiv(whole_from, M) * M, tl.cdiv(highest, M) * M)
    gap = tl.maximum(whole_to // M * M - one, 0)
    keys = load(k + key_head.to(tl.int64) * k_head, cols, there, k_stride, D, BLOCK_D, True, DOT)
    values = load(v + key_head.to(tl.int64) * v_head, cols, there, v_stride, D, BLOCK_D, True, DOT)
    dkeys = tl.zeros((N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((N, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = (key_head * GROUP + member).to(tl.int64)
        q_here = q + head * q_head
        grad_here = grad + head * grad_head
        lse_here = lse + head * T
        delta_here = delta + head * T
        dkeys, dvalues = _key_blocks(
            dkeys, dvalues, keys, values, q_here, q_stride, grad_here, grad_stride, lse_here, delta_here, intervals,
            cols, begin, highest - gap, one, gap, T, factor, softcap, D, BLOCK_D, M, True, SOFTCAP, DOT,
        )  # fmt: skip
        dkeys, dvalues = _key_blocks(
            dkeys, dvalues, keys, values, q_here, q_stride, grad_here, grad_stride, lse_here, delta_here, intervals,
            cols, one, one + gap, one, 0, T, factor, softcap, D, BLOCK_D, M, False, SOFTCAP, DOT,
        )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    place = (cols.to(tl.int64) * KEY_HEADS + key_head)[:, None] * D + dims[None, :]
    mask = there[:, None] & (dims < D)[None, :]
    tl.store(dk + place, (dkeys * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, dvalues.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def _query_blocks(
    dq, queries, up, base, product, k, k_stride, v, v_stride, row_lo, row_hi, begin, end, one, gap, T, factor, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, N):
        cols = tl.where(start < one, start, start + gap) + tl.arange(0, N)
        keys = load(k, cols, cols < T, k_stride, D, BLOCK_D, MASK, DOT)
        values = load(v, cols, cols < T, v_stride, D, BLOCK_D, MASK, DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        weights, slope = _weights(
            scores, base[:, None], row_lo[:, None], row_hi[:, None], cols[None, :], factor, softcap, MASK, SOFTCAP
        )
        dscores = weights * (tl.dot(up, tl.trans(values), input_precision="ieee") - product[:, None])
        if SOFTCAP:
            dscores = dscores * slope
        dq = tl.dot(dscores.to(DOT), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _delta_blocks(
    product, queries, up, base, k, k_stride, v, v_stride, row_lo, row_hi, begin, end, one, gap, T, factor, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, N):
        cols = tl.where(start < one, start, start + gap) + tl.arange(0, N)
        keys = load(k, cols, cols < T, k_stride, D, BLOCK_D, MASK, DOT)
        values = load(v, cols, cols < T, v_stride, D, BLOCK_D, MASK, DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        weights, _ = _weights(
            scores, base[:, None], row_lo[:, None], row_hi[:, None], cols[None, :], factor, softcap, MASK, SOFTCAP
        )
        product += tl.sum(weights * tl.dot(up, tl.trans(values), input_precision="ieee"), 1)
    return product


@triton.jit(do_not_specialize=["T"])
def _backward_queries(
    q, q_stride, q_head, k, k_stride, k_head, v, v_stride, v_head, grad, grad_stride, grad_head, lse, delta, intervals,
    dq, T, HEADS, GROUP, scale, factor, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS
    head = tl.program_id(0) % HEADS
    rows = tile * M + tl.arange(0, M)
    there = rows < T
    final = tl.minimum(tile * M + M, T) - 1
    row_lo = tl.load(intervals + rows, mask=there, other=0)
    row_hi = tl.load(intervals + T + rows, mask=there, other=-1)
    lowest = tl.load(intervals + tile * M)
    whole_from = tl.load(intervals + final)
    whole_to = tl.load(intervals + T + tile * M) + 1
    highest = tl.load(intervals + T + final) + 1
    begin = lowest // N * N
    one = tl.minimum(tl.cdiv(whole_from, N) * N, tl.cdiv(highest, N) * N)
    gap = tl.maximum(whole_to // N * N - one, 0)
    k += (head // GROUP).to(tl.int64) * k_head
    v += (head // GROUP).to(tl.int64) * v_head
    queries = load(q + head.to(tl.int64) * q_head, rows, there, q_stride, D, BLOCK_D, True, DOT)
    up = load(grad + head.to(tl.int64) * grad_head, rows, there, grad_stride, D, BLOCK_D, True, DOT)
    base = tl.load(lse + head.to(tl.int64) * T + rows, mask=there, other=0.0) * LOG2E
    if EXACT:
        product = tl.zeros((M,), tl.float32)
        product = _delta_blocks(
            product, queries, up, base, k, k_stride, v, v_stride, row_lo, row_hi, begin, highest - gap, one, gap, T,
            factor, softcap, D, BLOCK_D, N, True, SOFTCAP, DOT,
        )  # fmt: skip
        product = _delta_blocks(
            product, queries, up, base, k, k_stride, v, v_stride, row_lo, row_hi, one, one + gap, one, 0, T, factor,
            softcap, D, BLOCK_D, N, False, SOFTCAP, DOT,
        )  # fmt: skip
        tl.store(delta + head.to(tl.int64) * T + rows, product, mask=there)
    else:
        product = tl.load(delta + head.to(tl.int64) * T + rows, mask=there, other=0.0)
    total = tl.zeros((M, BLOCK_D), tl.float32)
    total = _query_blocks(
        total, queries, up, base, product, k, k_stride, v, v_stride, row_lo, row_hi, begin, highest - gap, one, gap, T,
        factor, softcap, D, BLOCK_D, N, True, SOFTCAP, DOT,
    )  # fmt: skip
    total = _query_blocks(
        total, queries, up, base, product, k, k_stride, v, v_stride, row_lo, row_hi, one, one + gap, one, 0, T,
        factor, softcap, D, BLOCK_D, N, False, SOFTCAP, DOT,
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    place = dq + (rows.to(tl.int64) * HEADS + head)[:, None] * D + dims[None, :]
    tl.store(place, (total * scale).to(dq.dtype.element_ty), mask=there[:, None] & (dims < D)[None, :])


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    """The tensor ``[T, H, D]``, or a copy whose last dimension is contiguous, and its other strides."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x, x.stride(0), x.stride(1)


def _factor(scale: float, softcap: float) -> float:
    return scale / softcap if softcap else scale * LOG2E.value


def forward(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The output (contiguous, q's dtype) and the logarithm of each row's sum of exponentials, ``[H, T]`` fp32."""
    total, heads, d = q.shape
    out = dispatch.allocate(q.shape, q.dtype, q.device)
    lse = dispatch.allocate((heads, total), torch.float32, q.device)
    if out.numel() == 0:
        return out, lse
    block = max(16, power_of_2(d))
    name, key = "packed_attention_forward", (block, softcap > 0)
    setting = tuning.settings(name, q.device, key, default=tiles("forward", block, q.device))
    launch(
        name, _forward, (cdiv(total, setting["M"]) * heads,), q.device,
        *_strided(q), *_strided(k), *_strided(v), out, lse, intervals, lse if sinks is None else sinks.contiguous(),
        total, heads, heads // k.shape[1], _factor(scale, softcap), softcap,
        D=d, BLOCK_D=block, SOFTCAP=softcap > 0, SINKS=sinks is not None, DOT=dot_dtype(q), **setting,
    )  # fmt: skip
    return out, lse


def delta(grad: Tensor, out: Tensor) -> Tensor:
    """``Σ grad · out`` over the last dimension, ``[H, T]`` fp32."""
    total, heads, d = out.shape
    result = dispatch.allocate((heads, total), torch.float32, out.device)
    if result.numel():
        rows = 16 if interpreting() else 64
        launch(
            "packed_attention_delta", _delta, (cdiv(total, rows) * heads,), out.device,
            *_strided(grad), *_strided(out), result, total, heads, d, M=rows, BLOCK_D=power_of_2(d),
        )  # fmt: skip
    return result


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v (contiguous) and of the sinks (empty where there are none)."""
    (total, heads, d), key_heads = q.shape, k.shape[1]
    dq, dk, dv = (dispatch.allocate(x.shape, x.dtype, x.device) for x in (q, k, v))
    if dq.numel() == 0:
        return dq, dk, dv, lse.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
    block = max(16, power_of_2(d))
    product = dispatch.allocate((heads, total), torch.float32, q.device) if exact else delta(grad, out)
    inputs = (*_strided(q), *_strided(k), *_strided(v), *_strided(grad), lse, product, intervals)
    numbers = (heads // key_heads, scale, _factor(scale, softcap), softcap)
    meta = {"D": d, "BLOCK_D": block, "SOFTCAP": softcap > 0, "DOT": dot_dtype(q)}
    key = (block, softcap > 0)
    name = "packed_attention_backward_queries"  # first: where D is exact, it makes it
    setting = tuning.settings(name, q.device, key, default=tiles("queries", block, q.device))
    launch(
        name, _backward_queries, (cdiv(total, setting["M"]) * heads,), q.device,
        *inputs, dq, total, heads, *numbers, EXACT=exact, **meta, **setting,
    )  # fmt: skip
    name = "packed_attention_backward_keys"
    setting = tuning.settings(name, q.device, key, default=tiles("keys", block, q.device))
    launch(
        name, _backward_keys, (cdiv(total, setting["N"]) * key_heads,), q.device,
        *inputs, dk, dv, total, key_heads, *numbers, **meta, **setting,
    )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, lse.new_zeros(0)
    return dq, dk, dv, -((sinks.float()[:, None] - lse).exp_().mul_(product)).sum(1).to(sinks.dtype)
