"""Packed attention in plain torch whose memory is bounded: any device, dtype and setting, for what has no faster way.

A block of queries at a time, documents of one length together. The backward pass computes the weights again from each
row's largest score m and sum l, with p = exp(s − m) / l, D = Σ p·(dO·Vᵀ) and, under a softcap, ds/dx = 1 − (s / cap)²:

    dV = pᵀ·dO        dS = p·(dO·Vᵀ − D)·(1 − (s / cap)²)        dQ = scale·dS·K        dK = scale·dSᵀ·Q

A sink is one more column of scores without a value, so its gradient is −Σ exp(sink − m) / l · D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ft_kernels import dispatch, tuning

__all__ = ["chunked_backward_op", "chunked_op"]

BUDGET = 1 << 24
"""Scores held at once; a few tensors of this many elements live at a time."""
ROWS = 256
"""Queries of a document at once, so that not much of what a causal mask hides is computed."""


def _pieces(shapes: list[int], heads: int, causal: bool, window: int) -> Iterator[tuple[int, int, int, slice, slice]]:
    """For each block: where its documents begin, how many they are and how long, its queries and the keys they see."""
    at = 0
    for count, length in zip(shapes[::2], shapes[1::2], strict=True):
        rows = max(1, min(length, ROWS, BUDGET // (heads * length)))
        together = max(1, BUDGET // (heads * length * rows))
        for first in range(0, count, together):
            documents = min(together, count - first)
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                oldest = max(0, start - window + 1) if window else 0
                keys = slice(oldest, stop if causal else length)
                yield at + first * length, documents, length, slice(start, stop), keys
        at += count * length


def _view(x: Tensor, at: int, documents: int, length: int, part: slice, groups: int) -> Tensor:
    """``[documents, groups, heads of a group, part, ...]`` of ``[T, H, ...]``."""
    block = x[at : at + documents * length].view(documents, length, groups, x.shape[1] // groups, *x.shape[2:])
    return block[:, part].movedim(1, 3)


def _rows(x: Tensor, where: tuple[int, int, int], part: slice, groups: int, dtype: torch.dtype) -> Tensor:
    """``[documents · groups, heads of a group · part, ...]``: the heads of a group share their keys."""
    block = _view(x, *where, part, groups)
    return block.reshape(block.shape[0] * groups, -1, *x.shape[2:]).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: for fp32, float64 where that is not many times slower; one rounding is left then."""
    if x.dtype == torch.float32 and (x.device.type == "cpu" or tuning.capability(x.device) in ((8, 0), (9, 0))):
        return torch.float64
    return torch.promote_types(x.dtype, torch.float32)


def _factors(x: Tensor) -> torch.dtype:
    """In what the products' factors are given: 16 bits where a GPU then sums in fp32, else what the sums are in."""
    knows_bf16 = torch.version.hip is not None or tuning.capability(x.device) >= (8, 0)
    if x.device.type == "cuda" and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and knows_bf16)):
        return x.dtype
    return _wide(x)


def _product(a: Tensor, b: Tensor) -> Tensor:
    b = b.to(a.dtype)
    with torch.autocast(a.device.type, enabled=False):  # it would round both factors, and the sum
        if a.dtype in (torch.float16, torch.bfloat16):
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a, b)


def _scores(
    q: Tensor, k: Tensor, queries: slice, keys: slice, causal: bool, window: int, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The scores, −inf where they are not seen, and (for a softcap) tanh, of which the gradient is made."""
    scores = _product(q, k.transpose(1, 2)).mul_(scale)
    tanh = scores
    if softcap:
        tanh = scores.div_(softcap).tanh_()
        scores = tanh * softcap
    if causal:
        i = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=q.device)
        hidden = j > i
        if window:
            hidden = hidden | (i - j >= window)
        scores.view(-1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    return scores, tanh


def _sinks(sinks: Tensor | None, like: Tensor, documents: int, groups: int) -> Tensor | None:
    """Each row's sink, for rows as :func:`_rows` has them."""
    if sinks is None:
        return None
    each = sinks.to(like.dtype).view(1, groups, -1, 1)
    return each.expand(documents, -1, -1, like.shape[1] // each.shape[2]).reshape(like.shape)


@torch.library.custom_op(
    "ft_kernels::packed_attention_chunked",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? sinks, int[] shapes, bool causal, int window, float softcap, "
    "float scale) -> (Tensor, Tensor, Tensor)",
)
def chunked_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    shapes: list[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and of each row and head the largest score and the sum of exp(score − largest).

    Args:
        q, k, v: ``[T, H, D]``, documents of one length side by side.
        shapes: of each such group, how many documents and how long.
        window, softcap: 0 for none.
    """
    wide = _wide(q)
    out = dispatch.allocate(q.shape, q.dtype, q.device)
    largest = dispatch.allocate(q.shape[:2], wide, q.device)
    total = dispatch.allocate(q.shape[:2], wide, q.device)
    groups, low = k.shape[1], _factors(q)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    for at, documents, length, queries, keys in _pieces(shapes, q.shape[1], causal, window):
        where = (at, documents, length)
        seen, values = (_rows(x, where, keys, groups, low) for x in (k, v))
        scores, _ = _scores(
            _rows(q, where, queries, groups, low), seen, queries, keys, causal, window, softcap, scale
        )  # fmt: skip
        m = scores.amax(-1)
        sink = _sinks(sinks, m, documents, groups)
        if sink is not None:
            m = torch.maximum(m, sink)
        weights = scores.sub_(m[..., None]).exp_()
        denominator = weights.sum(-1)
        if sink is not None:
            denominator += (sink - m).exp()
        result = _product(weights.div_(denominator[..., None]).to(low), values)
        for target, source in ((out, result), (largest, m), (total, denominator)):
            part = _view(target, *where, queries, groups)
            part.copy_(source.view(part.shape))
    return out, largest, total


@chunked_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    shapes: list[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(q)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide), q.new_empty(q.shape[:2], dtype=wide)


@torch.library.custom_op(
    "ft_kernels::packed_attention_chunked_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor largest, Tensor total, "
    "int[] shapes, bool causal, int window, float softcap, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def chunked_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    largest: Tensor,
    total: Tensor,
    shapes: list[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks (empty where there are none)."""
    wide = _wide(q)
    groups, low = k.shape[1], _factors(q)
    dq = dispatch.allocate(q.shape, q.dtype, q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    dsinks = torch.zeros(0 if sinks is None else sinks.numel(), dtype=wide, device=q.device)
    q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
    for at, documents, length, queries, keys in _pieces(shapes, q.shape[1], causal, window):
        where = (at, documents, length)
        rows, up = (_rows(x, where, queries, groups, low) for x in (q, grad))
        seen, values = (_rows(x, where, keys, groups, low) for x in (k, v))
        m, denominator = (_rows(x, where, queries, groups, wide) for x in (largest, total))
        scores, tanh = _scores(rows, seen, queries, keys, causal, window, softcap, scale)
        weights = scores.sub_(m[..., None]) if not softcap else scores - m[..., None]
        weights = weights.exp_().div_(denominator[..., None])
        _add(dv, where, keys, groups, _product(weights.transpose(1, 2).to(low), up))
        dscores = _product(up, values.transpose(1, 2))
        product = (dscores * weights).sum(-1)
        dscores.sub_(product[..., None]).mul_(weights)
        if softcap:
            dscores.mul_(1 - tanh * tanh)
        dscores = dscores.mul_(scale).to(low)
        part = _view(dq, *where, queries, groups)
        part.copy_(_product(dscores, seen).view(part.shape))
        _add(dk, where, keys, groups, _product(dscores.transpose(1, 2), rows))
        sink = _sinks(sinks, m, documents, groups)
        if sink is not None:
            share = (sink - m).exp_().div_(denominator).mul_(product)
            dsinks -= share.view(documents, dsinks.numel(), -1).sum((0, 2))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks if sinks is None else dsinks.to(sinks.dtype)


def _add(total: Tensor, where: tuple[int, int, int], part: slice, groups: int, addend: Tensor) -> None:
    block = _view(total, *where, part, groups)
    block += addend.view(block.shape)


@chunked_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    largest: Tensor,
    total: Tensor,
    shapes: list[int],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0, dtype=_wide(q)) if sinks is None else sinks
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks.new_empty(dsinks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, *settings = inputs
    ctx.save_for_backward(q, k, v, sinks, *output[1:])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    sinks = ctx.saved_tensors[3]
    dq, dk, dv, dsinks = chunked_backward_op(grad, *ctx.saved_tensors, *ctx.settings)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None, None


chunked_op.register_autograd(_backward, setup_context=_setup_context)
