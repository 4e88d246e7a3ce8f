"""Packed attention by each backend, all with one signature: rows ``[T, H, D]`` and a plan in, ``[T, H, D]`` out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ft_kernels.ops.packed_attention import reference as packed_attention_reference
from ft_kernels.ops.packed_attention.autograd import torch_op, triton_op
from ft_kernels.ops.packed_attention.choose import LONG, has_cudnn
from ft_kernels.ops.packed_attention.chunked import chunked_op
from ft_kernels.ops.packed_attention.plan import AttentionPlan, block_lists

__all__ = ["RUN", "Settings"]

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Settings:
    """The settings of a layer; window and softcap are None where there is none. exact: see ``kernels``' EXACT."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    exact: bool = False


def _reference(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings
) -> Tensor:
    bounds = plan.cu_seqlens(q.device)
    with torch.autocast(q.device.type, enabled=False):  # its products are of fp32 numbers, as they are
        return packed_attention_reference.packed_attention(
            q, k, v, bounds, sinks, settings.causal, settings.window, settings.softcap, settings.scale, plan.together
        )


def _triton(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings) -> Tensor:
    intervals = plan.intervals(settings.causal, settings.window, q.shape[0], q.device)
    out: Tensor = triton_op(q, k, v, intervals, sinks, settings.scale, settings.softcap or 0.0, settings.exact)[0]
    return out


def _dense(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings) -> Tensor:
    """Documents of one length as a batch: the row is only looked at in another shape."""
    if has_cudnn(q):
        inputs = _last_contiguous(q, k, v)
        out: Tensor = torch_op(*inputs, None, sinks, "dense", plan.max_length, settings.causal, 0, settings.scale)[0]
        return out
    return _attend(q, k, v, len(plan.host_lengths()), settings)


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: int, settings: Settings) -> Tensor:
    """torch's attention over so many documents of one length, side by side."""
    q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
    if q.device.type != "cpu" and q.shape[1] != k.shape[1]:
        # Of torch's kernels, the only one for cards before Ampere knows no groups; without it every score is held.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=settings.causal, scale=settings.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings) -> Tensor:
    """torch's attention once for each length of document that there is; of long documents, once for each."""
    if q.shape[0] >= LONG * len(plan.host_lengths()):
        parts = [x.split(list(plan.host_lengths())) for x in (q, k, v)]
        return torch.cat([_attend(qs, ks, vs, 1, settings) for qs, ks, vs in zip(*parts, strict=True)])
    order, inverse, shapes = plan.by_length(q.device)
    sizes = [count * length for count, length in shapes]
    qs, ks, vs = (x.index_select(0, order).split(sizes) for x in (q, k, v))
    outs = [_attend(qs[i], ks[i], vs[i], count, settings) for i, (count, _) in enumerate(shapes)]
    return torch.cat(outs).index_select(0, inverse)


def _chunked(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings) -> Tensor:
    order, inverse, shapes = plan.by_length(q.device)
    arguments = (settings.causal, settings.window or 0, settings.softcap or 0.0, settings.scale)
    if len(shapes) > 1:
        q, k, v = (x.index_select(0, order) for x in (q, k, v))
    out: Tensor = chunked_op(q, k, v, sinks, [number for shape in shapes for number in shape], *arguments)[0]
    return out.index_select(0, inverse) if len(shapes) > 1 else out


def _flash(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings) -> Tensor:
    window = settings.window or 0
    documents = plan.cu_seqlens(q.device)
    out: Tensor = torch_op(
        *_last_contiguous(q, k, v), documents, sinks, "flash", plan.max_length, settings.causal, window, settings.scale
    )[0]
    return out


def _last_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    documents = plan.cu_seqlens(q.device)
    out: Tensor = flash_attn_varlen_func(
        *_last_contiguous(q, k, v),
        documents,
        documents,
        plan.max_length,
        plan.max_length,
        softmax_scale=settings.scale,
        causal=settings.causal,
        window_size=(settings.window - 1, 0) if settings.window else (-1, -1),
        softcap=settings.softcap or 0.0,
    )
    return out


@cache
def _compiled_flex(*combination: Any) -> Callable[..., Any]:
    """flex attention for one combination of heads, dtype and settings; a second length makes the length dynamic."""
    from torch.nn.attention import flex_attention as module

    flex_attention: Callable[..., Any] = module.flex_attention

    def attend(*tensors: Tensor, **keywords: Any) -> Any:
        return flex_attention(*tensors, **keywords)

    # Dynamo counts compilations by code object and gives up after a few, so each combination has a code object of its
    # own. fullgraph: an error is better than the eager version, which would hold every score.
    attend.__code__ = attend.__code__.replace(co_name=f"attend_{abs(hash(combination))}")
    return torch.compile(attend, fullgraph=True)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    # One function for each number, since a new function would be compiled again.
    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


def block_mask(plan: AttentionPlan, settings: Settings, total: int, device: torch.device) -> Any:
    """flex attention's mask of the plan, without holding a score for each pair of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    def make() -> Any:
        intervals = plan.intervals(settings.causal, settings.window, total, device)
        lo, hi = intervals[0].contiguous(), intervals[1].contiguous()

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j >= lo[i]) & (j <= hi[i])

        lists = block_lists(intervals, FLEX_BLOCK)
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(total, total))

    return plan.keep(("block mask", settings.causal, settings.window, total, device), make)


def _flex(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: AttentionPlan, settings: Settings) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attend: Callable[..., Any] = flex_attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        heads = (q.shape[1], *k.shape[1:], q.dtype, q.device)
        attend = _compiled_flex(*heads, settings.softcap, settings.scale, sinks is None)
    keywords: dict[str, Any] = {
        "block_mask": block_mask(plan, settings, q.shape[0], q.device),
        "score_mod": None if settings.softcap is None else _capped(settings.softcap),
        "scale": settings.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    if sinks is None:
        out = attend(*batch, **keywords)
    else:
        out, aux = attend(*batch, return_aux=AuxRequest(lse=True), **keywords)
        # exp(lse) / (exp(lse) + exp(sink)) is what the sink leaves to the keys.
        out = (out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None]).to(q.dtype)
    result: Tensor = out[0].transpose(0, 1)
    return result


RUN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionPlan, Settings], Tensor]] = {
    "chunked": _chunked,
    "dense": _dense,
    "flash": _flash,
    "flash_attn": _flash_attn,
    "flex": _flex,
    "reference": _reference,
    "sdpa": _sdpa,
    "triton": _triton,
}
