"""Attention over documents packed into one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.packed_attention.choose import BACKENDS, Backend, case_of, choose, why_not
from ft_kernels.ops.packed_attention.direct import Direct, direct
from ft_kernels.ops.packed_attention.plan import AttentionPlan
from ft_kernels.ops.packed_attention.shared import SharedDirect, SharedPlan

if TYPE_CHECKING:
    from ft_kernels.ops.packed_attention.backends import Settings

__all__ = ["AttentionPlan", "Backend", "direct_attention", "packed_attention", "plan_attention"]


def plan_attention(
    *,
    lengths: Sequence[int] | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    branches: Sequence[Sequence[int]] | None = None,
    max_length: int | None = None,
    together: Tensor | None = None,
) -> AttentionPlan:
    """Where the documents of a batch lie: made once a batch, handed to every layer's :func:`packed_attention`.

    What layers share (the documents' bounds on the device, flex attention's block masks) is made on first use and kept
    in the plan, for each window that occurs. Before a CUDA graph is captured, use the plan once in the same way: what
    the capture made and the plan kept would be numbers of the graph alone.

    The best choice of a backend needs the lengths on the host. Give them there, as ``lengths`` or as tensors on the
    CPU, where a collator has them anyway. Given a tensor on a GPU, this function copies it to the host, which waits for
    the GPU once; given ``max_length`` too, it does not, and neither does any layer: then flex, our kernel and, with
    ``cu_seqlens``, FlashAttention compute, but documents of one length are not recognized.

    Args:
        lengths: the length of each document, in order; they add up to the number of tokens. Zero is allowed.
        cu_seqlens: ``[documents + 1]`` integers, where each document begins, from 0, and at the end the number of
            tokens.
        position_ids: ``[T]`` or ``[B, S]`` integers. A document begins with each row and where a position is not one
            more than the position before it, as transformers has it.
        branches: for documents that begin alike, as answers to one prompt do: of each group the length of what they
            share and those of what follows it in each, ``[[prompt, answer, answer], ...]``. The row holds what is
            shared once, then what follows, in this order; each token sees what is shared and what it follows itself.
        max_length: the longest document or more. Needed only to leave a tensor on its GPU; it is believed, so too small
            a number gives wrong results.
        together: bool ``[T]`` or ``[B, S]``, true at tokens that see what follows them too, as far as their run of such
            tokens within their document goes: what an image is in Gemma 3 (arXiv:2503.19786). A window bounds what a
            token sees before it and nothing else, as in transformers. "triton", "flex" and "reference" compute it;
            "auto" takes one of these.

    Raises:
        TypeError: a tensor's dtype is not an integer, or that of ``together`` not bool.
        ValueError: none or more than one of the first four is given, or what is given describes no documents.
    """
    given = {"lengths": lengths, "cu_seqlens": cu_seqlens, "position_ids": position_ids, "branches": branches}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"plan_attention: got {' and '.join(names) or 'no documents'}; "
            "give one of lengths, cu_seqlens, position_ids, branches"
        )
    if together is not None:
        if together.dtype != torch.bool:
            raise TypeError(f"plan_attention: together has dtype {together.dtype}; use bool")
        if branches is not None:
            raise ValueError("plan_attention: got together and branches; what is shared cannot see what follows it")
        together = together.flatten()
    if branches is not None:
        return _branched(branches, max_length)
    source = given[names[0]]
    if isinstance(source, Tensor) and (source.is_floating_point() or source.is_complex() or source.dtype == torch.bool):
        raise TypeError(f"plan_attention: {names[0]} has dtype {source.dtype}; use an integer dtype")
    if max_length is not None and max_length < 0:
        raise ValueError(f"plan_attention: max_length={max_length}; give the longest document's length, or None")
    begins = None
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"plan_attention: cu_seqlens has shape {list(cu_seqlens.shape)}; use [documents + 1]")
        if cu_seqlens.device.type != "cpu" and max_length is not None:
            return AttentionPlan(cu_seqlens=cu_seqlens.to(torch.int32), max_length=max_length, together=together)
        numbers = cu_seqlens.tolist()
        if numbers[0] != 0:
            raise ValueError(f"plan_attention: cu_seqlens begins with {numbers[0]}; it begins with 0")
        found = [after - before for before, after in pairwise(numbers)]
    elif position_ids is not None:
        if position_ids.dim() not in (1, 2):
            raise ValueError(f"plan_attention: position_ids has shape {list(position_ids.shape)}; use [T] or [B, S]")
        rows = position_ids if position_ids.dim() == 2 else position_ids[None]
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
        begins = begins.flatten()
        if begins.device.type != "cpu" and max_length is not None:
            return AttentionPlan(begins=begins, max_length=max_length, together=together)
        starts = begins.cpu().nonzero().flatten().tolist()  # counted there, a GPU would be waited for twice
        found = [after - before for before, after in pairwise([*starts, begins.numel()])]
    else:
        found = lengths.tolist() if isinstance(lengths, Tensor) else [int(length) for length in lengths or ()]
    shortest = min(found, default=0)
    if shortest < 0:
        raise ValueError(f"plan_attention: a document has length {shortest}; a document's length is 0 or more")
    if max_length is not None and max_length < max(found, default=0):
        raise ValueError(
            f"plan_attention: max_length={max_length}, but a document has {max(found)} tokens; "
            "give the longest, or None"
        )
    on_device = cu_seqlens if cu_seqlens is not None and cu_seqlens.device.type != "cpu" else None
    if together is not None and together.numel() != sum(found):
        raise ValueError(
            f"plan_attention: together has {together.numel()} tokens, the documents have {sum(found)} in all; give one "
            "for each"
        )
    return AttentionPlan(lengths=found, cu_seqlens=on_device, max_length=max_length, together=together)


def _branched(branches: Sequence[Sequence[int]], max_length: int | None) -> SharedPlan:
    for group in branches:
        if len(group) < 2 or min(group) < 0:
            raise ValueError(
                f"plan_attention: branches has {list(group)}; a group is the length of what is shared and at least one "
                "of what follows, each 0 or more"
            )
    plan = SharedPlan(branches)
    if max_length is not None and max_length < plan.max_length:
        raise ValueError(
            f"plan_attention: max_length={max_length}, but a document has {plan.max_length} tokens; give the longest, "
            "or None"
        )
    return plan


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    max_length: int | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    exact: bool = False,
    heads_first: bool = False,
    backend: Backend | str = "auto",
) -> Tensor:
    """Softmax attention in which the tokens of a document see each other and nothing else.

    For a query i and a key j of one document, with j ≤ i where ``causal`` and i − j < ``window`` where there is one,

        ``s_ij = softcap · tanh(scale · q_i·k_j / softcap)`` (without a softcap, ``scale · q_i·k_j``)

        ``out_i = Σ_j exp(s_ij) · v_j / (Σ_j exp(s_ij) + exp(sink))`` (without sinks, no last term)

    Attention: Vaswani et al. 2017, section 3.2 (arXiv:1706.03762). Grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245). Softcap: Gemma 2, section 2 (arXiv:2408.00118). Sinks, a learned logit for each head: gpt-oss's
    model card, section 2.3 (arXiv:2508.10925). Window: as transformers' ``sliding_window`` in a causal mask.

    Args:
        q: ``[T, H, D]``, all tokens in one row, or ``[B, S, H, D]``, which is the row of its rows. fp16, bf16, fp32 or
            float64, any strides, possibly empty.
        k, v: as q, with G heads where G divides H; query head h reads head h // (H / G).
        plan: the documents, from :func:`plan_attention`; made once a batch, it saves each layer that work. Only a plan
            can have documents that share how they begin.
        lengths, cu_seqlens, position_ids, max_length: the documents instead of a plan, as :func:`plan_attention` has
            them. With none of them, each row of ``[B, S, H, D]``, or all of ``[T, H, D]``, is one document.
        causal: whether a token sees only itself and what is before it.
        window: how many tokens a token sees, itself included. Only where causal.
        softcap: a positive bound on the scores, or None.
        sinks: ``[H]``, floating point, or None.
        scale: multiplies the products; None is ``1 / sqrt(D)``.
        exact: takes backward's sums over a row from its weights and not, as FlashAttention does, from the output, which
            is rounded. Where biases of q and k are trained in 16 bits, whose gradients are what nearly cancels, their
            error is halved by it. It is for "triton" and "chunked" (which always does), so that "auto" takes our kernel
            where it would take a faster one: up to half as fast in forward beside cuDNN, and a quarter more in
            backward. Where our kernel can't run, "auto" is what it is without.
        heads_first: q, k, v and the result are ``[B, H, S, D]``, transformers' layout.
        backend: "auto" picks by hardware, documents and settings (``ops/packed_attention/choose.py`` has the table and
            its reasons). "dense", "flex", "flash" (torch's FlashAttention-2), "flash_attn" (the package),
            "triton" (our kernel), "sdpa", "chunked" and "reference" ask for one.

    Returns:
        As q, in q's dtype. Gradients come back for q, k, v and the sinks.

        "flex" is compiled when it first meets a combination of heads, dtype and settings, which takes seconds; the
        others are not. On GPUs fp32 and float64 are computed in chunks of bounded memory, exactly and slowly. Under
        ``torch.compile`` the documents are constants: other documents are another graph.

    Raises:
        TypeError: a dtype is not floating point, or q, k and v differ in it.
        ValueError: shapes, devices, documents or settings do not fit, or the backend asked for cannot compute them.
    """
    shape = q.shape
    if heads_first:
        _check_tensors(q, k, v, sinks, heads_first)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shape = q.shape
    documents = (lengths, cu_seqlens, position_ids, max_length)
    if isinstance(plan, SharedPlan):
        _shared(q, k, v, plan, documents, causal)
        copies = [plan.copied(x.flatten(0, -3)) for x in (q, k, v)]
        named: dict[str, Any] = {"sinks": sinks, "scale": scale, "exact": exact, "backend": backend}
        out = packed_attention(*copies, plan=plan.whole, window=window, softcap=softcap, **named)
        out = plan.taken(out).view(q.shape)
        return out.transpose(1, 2) if heads_first else out
    backend, plan, settings = _decide(q, k, v, plan, documents, causal, window, softcap, sinks, scale, backend, exact)
    if q.dim() == 4:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    from ft_kernels.ops.packed_attention.backends import RUN

    out = RUN[backend](q, k, v, sinks, plan, settings)
    if len(shape) == 4:
        out = out.unflatten(0, shape[:2])
    return out.transpose(1, 2) if heads_first else out


def direct_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: AttentionPlan | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: Backend | str = "auto",
) -> Direct | SharedDirect | None:
    """The kernels that :func:`packed_attention` would launch; None where there are none to be called by themselves."""
    if not q.numel() or any(x.stride(-1) != 1 for x in (q, k, v)):
        return None
    if isinstance(plan, SharedPlan):
        _shared(q, k, v, plan, (None,) * 4, causal)
        named: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
        pieces = []
        for part in plan.pieces():
            # of the copies' shape, without their memory: only what the choice of a backend reads
            like = [x.flatten(0, -3)[:1].expand(part.copied_total, -1, -1) for x in (q, k, v)]
            whole = direct_attention(*like, plan=part.whole, backend=backend, **named)
            if not isinstance(whole, Direct):
                return None
            pieces.append((part, whole))
        return SharedDirect(tuple(pieces))
    backend, plan, settings = _decide(q, k, v, plan, (None,) * 4, causal, window, softcap, None, scale, backend)
    return direct(backend, plan, settings, q)


def _shared(
    q: Tensor, k: Tensor, v: Tensor, plan: SharedPlan, documents: tuple[Any, ...], causal: bool
) -> None:  # fmt: skip
    _check_tensors(q, k, v, None, False)
    _plan(q.shape, plan, *documents)
    if not causal:
        raise ValueError("packed_attention: causal=False with branches; what is shared cannot see what follows it")


def _decide(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | None,
    documents: tuple[Any, ...],
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    scale: float | None,
    backend: str,
    exact: bool = False,
) -> tuple[str, AttentionPlan, Settings]:
    """The backend, the documents and the settings for q ``[T, H, D]`` or ``[B, S, H, D]``, after all checks."""
    from ft_kernels.ops.packed_attention.backends import Settings

    _check_tensors(q, k, v, sinks, False)
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"packed_attention: window={window} with causal={causal}; a window is 1 or more, and needs causal=True"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"packed_attention: softcap={softcap}; allowed is a positive number, or None for no cap")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"packed_attention: backend={backend!r}; allowed are 'auto', {', '.join(map(repr, BACKENDS))}")
    given = plan is not None or any(value is not None for value in documents)
    plan = _plan(q.shape, plan, *documents)
    if window is not None and window >= plan.max_length:
        window = None  # it hides nothing
    settings = Settings(causal, window, softcap, 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), exact)
    if exact and backend not in ("auto", "triton", "chunked"):
        raise ValueError(f"packed_attention: exact with backend={backend!r}; allowed are 'auto', 'triton', 'chunked'")
    if plan.together is not None and not causal:
        raise ValueError("packed_attention: causal=False with together; without a causal mask all see each other")
    recurring = not given or plan.recurs
    return _backend(q, plan, settings, sinks is not None, recurring, backend), plan, settings


def _backend(q: Tensor, plan: AttentionPlan, settings: Settings, sinks: bool, recurring: bool, backend: str) -> str:
    if q.numel() == 0:
        return "chunked"
    case = case_of(
        q,
        max_length=plan.max_length,
        equal=plan.equal,
        counted=plan.count is not None,
        mean_length=0 if plan.lengths is None else math.prod(q.shape[:-2]) // max(len(plan.lengths), 1),
        recurring=recurring,
        causal=settings.causal,
        window=settings.window is not None,
        softcap=settings.softcap is not None,
        sinks=sinks,
        together=plan.together is not None,
    )
    if backend == "auto":
        return "triton" if settings.exact and why_not("triton", case) is None else choose(case)
    if (reason := why_not(backend, case)) and not (backend == "triton" and use_triton(q)):
        raise ValueError(f"packed_attention: backend={backend!r} cannot compute this: {reason}; use 'auto'")
    return backend


def _plan(shape: torch.Size, plan: AttentionPlan | None, *documents: Any) -> AttentionPlan:
    total = math.prod(shape[:-2])
    names = ("lengths", "cu_seqlens", "position_ids", "max_length")
    given = {name: value for name, value in zip(names, documents, strict=True) if value is not None}
    if plan is None:
        if not given:
            given["lengths"] = [shape[1]] * shape[0] if len(shape) == 4 else [total]
        plan = plan_attention(**given)
    elif given:
        raise ValueError(f"packed_attention: got a plan and {' and '.join(given)}; a plan has the documents, give one")
    if plan.total is not None and plan.total != total:
        raise ValueError(
            f"packed_attention: the documents have {plan.total} tokens in all, q has {total}; let them add up, "
            "padding being documents too"
        )
    return plan


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, heads_first: bool) -> None:
    if not q.is_floating_point():
        raise TypeError(f"packed_attention: q has dtype {q.dtype}; use a floating-point dtype")
    if q.dim() not in (3, 4) or (heads_first and q.dim() == 3) or q.shape[-1] == 0:
        layouts = "[B, H, S, D]" if heads_first else "[T, H, D] or [B, S, H, D]"
        raise ValueError(f"packed_attention: q has shape {list(q.shape)}; use {layouts}")
    at = 1 if heads_first else q.dim() - 2
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"packed_attention: q has dtype {q.dtype}, {name} {x.dtype}; use one dtype")
        if x.device != q.device:
            raise ValueError(f"packed_attention: q is on {q.device}, {name} on {x.device}; move them to one device")
        expected = list(q.shape)
        expected[at] = k.shape[at] if k.dim() == q.dim() else 0
        if list(x.shape) != expected or x.shape[at] == 0 or q.shape[at] % x.shape[at]:
            raise ValueError(
                f"packed_attention: q {list(q.shape)} and {name} {list(x.shape)} do not fit; k and v have q's shape "
                "but for the heads, whose number divides q's"
            )
    if sinks is not None:
        if not sinks.is_floating_point():
            raise TypeError(f"packed_attention: sinks have dtype {sinks.dtype}; use a floating-point dtype")
        if list(sinks.shape) != [q.shape[at]]:
            raise ValueError(f"packed_attention: sinks have shape {list(sinks.shape)}; q needs [{q.shape[at]}]")
        if sinks.device != q.device:
            raise ValueError(f"packed_attention: q is on {q.device}, sinks on {sinks.device}; move them to one device")
