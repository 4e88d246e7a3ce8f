"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.rope import reference
from ft_kernels.ops.rope.autograd import rope_inplace_op, rope_op

__all__ = ["RopeLayout", "check_rope", "for_tokens", "rope", "rotated_pairs"]

RopeLayout = Literal["half", "interleaved"]


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    rotary_dim: int | None = None,
    layout: RopeLayout = "half",
    heads_dim: int = -2,
    inplace: bool = False,
    sections: Sequence[int] | None = None,
    interleaved_sections: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in one pass.

    Pair i, ``(a, b)``, of a token at angle θ becomes ``(a·cos θ − b·sin θ, b·cos θ + a·sin θ)``: RoFormer, equation 34
    (Su et al. 2021, arXiv:2104.09864). Multimodal sections: Qwen2-VL, section 2.1 (arXiv:2409.12191), and interleaved
    Qwen3-VL (arXiv:2511.21631).

    Args:
        q: ``[B, S, heads, D]``, or packed ``[T, heads, D]``; floating point, any strides, read without a copy where
            the last dimension is contiguous.
        k: as q, with any number of heads.
        cos, sin: one row of angles a token: ``[S, n]`` or longer (the first S rows count), or ``[B or 1, S, n]`` as
            transformers' rotary embeddings give them. n is ``rotary_dim / 2``, a column for each pair, or
            ``rotary_dim`` for transformers' doubled form ``cat((angles, angles), -1)``, whose first half is read. Where
            every angle is repeated instead (Cohere, GLM-4V), give ``cos[..., ::2]``, which costs no copy. Constants:
            no gradient comes back for them.
        position_ids: integers ``[S]`` or ``[B or 1, S]``: the row of a table ``[P, n]`` that each token takes, for
            packed documents.
        rotary_dim: how many dimensions are turned, an even number; those after it pass through. It may be left out
            where cos has D columns; with fewer, they could mean D/2 pairs or a partial rotation.
        layout: ``"half"`` pairs dimension i with ``i + rotary_dim / 2`` (Llama, Qwen, GPT-NeoX); ``"interleaved"``
            pairs neighbours (GPT-J, GLM, Cohere, DeepSeek, whose own code then also sorts the dimensions of both q and
            k: the products are the same).
        heads_dim: where the heads are; 1 for transformers' ``[B, heads, S, D]``.
        inplace: write over q and k, and return them. Where gradients are recorded (or their memory is not theirs alone
            to write) they stay as they are and new tensors are returned, so use what is returned.
        sections: pairs turned by each position stream (transformers' ``mrope_section``; two to four numbers that add up
            to ``rotary_dim / 2``). position_ids, or cos and sin without them, then have the streams as an additional
            first dimension.
        interleaved_sections: the streams (three) alternate from pair to pair (Qwen3-VL) and are not blocks (Qwen2-VL).

    Returns:
        q and k turned, in their own shapes and dtypes; computed in fp32, rounded once.

    Raises:
        TypeError: q, k, cos or sin is not floating point, or position_ids not integers.
        ValueError: shapes, devices or settings do not fit.
        IndexError: a position is not in the table, where torch computes; a kernel cannot raise without stopping the
            GPU's queue, and makes that token nan instead.
    """
    check_rope(q, k, cos, sin, position_ids, layout, heads_dim)
    pairs = rotated_pairs(q.shape[-1], cos.shape[-1], rotary_dim)
    parts = _sections(sections, pairs, interleaved_sections)
    views = [t.movedim(heads_dim, -2) for t in (q, k)]
    if q.dim() == 3:
        views = [t.unsqueeze(0) for t in views]
    batches, length = views[0].shape[:2]
    if views[1].shape[:2] != (batches, length):
        raise ValueError(f"rope: q is {list(q.shape)}, k {list(k.shape)}; only the number of heads may differ")
    tables = [t.detach() for t in (cos, sin)]
    if position_ids is None:
        tables = [for_tokens("cos and sin", t, parts, batches, length, 1) for t in tables]
    elif cos.dim() != 2:
        raise ValueError(f"rope: cos is {list(cos.shape)}; with position_ids it is a table [positions, n]")
    else:
        position_ids = for_tokens("position_ids", position_ids, parts, batches, length, 0)
    tables = [t[..., :pairs] for t in tables]
    settings = (tables[0], tables[1], position_ids, parts, layout == "interleaved", interleaved_sections)
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if not use_triton(q, k, *tables):
        turned = reference.rope(views[0], views[1], *settings)
    elif inplace and not recorded and all(map(_writable, views)):
        rope_inplace_op(views[0], views[1], *settings, False)
        return q, k
    else:
        turned = rope_op(views[0], views[1], *settings, False)
    if q.dim() == 3:
        turned = turned[0].squeeze(0), turned[1].squeeze(0)
    new_q, new_k = (t.movedim(-2, heads_dim) for t in turned)
    if inplace and not recorded and all(map(_writable, views)):
        return q.copy_(new_q), k.copy_(new_k)
    return new_q, new_k


def _writable(view: Tensor) -> bool:
    return all(size <= 1 or stride != 0 for size, stride in zip(view.shape, view.stride(), strict=True))


def rotated_pairs(d: int, columns: int, rotary_dim: int | None) -> int:
    """How many pairs of a head of d are turned, by tables of so many columns; raises if they do not fit."""
    if rotary_dim is None:
        if columns != d:
            raise ValueError(
                f"rope: cos has {columns} columns and a head {d} dimensions; say what is turned: "
                f"rotary_dim={2 * columns} (a column for each pair) or {columns} (transformers' doubled form)"
            )
        rotary_dim = columns
    if rotary_dim % 2 or not 2 <= rotary_dim <= d:
        raise ValueError(f"rope: rotary_dim is {rotary_dim}; allowed are even numbers from 2 to {d}, a head's size")
    if columns not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"rope: cos has {columns} columns; rotary_dim={rotary_dim} needs {rotary_dim // 2}, or {rotary_dim} doubled"
        )
    return rotary_dim // 2


def _sections(sections: Sequence[int] | None, pairs: int, interleaved: bool) -> list[int]:
    if not sections:
        if interleaved:
            raise ValueError("rope: interleaved_sections is set without sections; give the three sections")
        return []
    parts = [int(count) for count in sections]
    if not 2 <= len(parts) <= 4 or min(parts) < 0 or sum(parts) != pairs or (interleaved and len(parts) != 3):
        allowed = "three" if interleaved else "two to four"
        raise ValueError(f"rope: sections are {parts}; allowed are {allowed} numbers that add up to {pairs} pairs")
    return parts


def for_tokens(what: str, given: Tensor, sections: list[int], batches: int, length: int, columns: int) -> Tensor:
    """``given`` as ``[streams, batches, length]`` (and columns, 0 or 1 dimensions), by views."""
    streams = len(sections) or 1
    shaped = given if sections else given.unsqueeze(0)
    if shaped.dim() == 2 + columns:
        shaped = shaped.unsqueeze(1)
        if columns:
            shaped = shaped[:, :, :length]  # a table may be longer than the sequence
    if shaped.dim() != 3 + columns or shaped.shape[0] != streams or shaped.shape[2] != length:
        fits = False
    else:
        fits = shaped.shape[1] in (1, batches)
    if not fits:
        first = f"{streams} streams, " if sections else ""
        last = ", n" if columns else ""
        raise ValueError(
            f"rope: {what} have shape {list(given.shape)}; {batches} sequences of {length} tokens need "
            f"[{first}{length}{last}] or [{first}{batches} or 1, {length}{last}]"
        )
    return shaped.expand(streams, batches, length, *shaped.shape[3:])


def check_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, layout: str, heads_dim: int
) -> None:
    """Raise if dtypes, devices, shapes or settings do not fit."""
    for name, tensor in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise TypeError(f"rope: {name} has dtype {tensor.dtype}; use a floating-point dtype")
        if tensor.device != q.device:
            raise ValueError(f"rope: {name} is on {tensor.device}, q on {q.device}; move them to one device")
    if q.dim() not in (3, 4) or k.dim() != q.dim() or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"rope: q is {list(q.shape)}, k {list(k.shape)}; both are [B, S, heads, D] or [T, heads, D], of one D"
        )
    if not -q.dim() <= heads_dim < q.dim() or heads_dim % q.dim() not in (q.dim() - 2, q.dim() - 3):
        raise ValueError(f"rope: heads_dim={heads_dim}; allowed are -2 (before D) and -3 (before the tokens)")
    if cos.shape != sin.shape or cos.dim() < 2:
        raise ValueError(f"rope: cos is {list(cos.shape)}, sin {list(sin.shape)}; use one shape [..., S, n]")
    if layout not in ("half", "interleaved"):
        raise ValueError(f"rope: layout={layout!r}; allowed are 'half' and 'interleaved'")
    if position_ids is not None:
        if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
            raise TypeError(f"rope: position_ids have dtype {position_ids.dtype}; use an integer dtype")
        if position_ids.device != q.device:
            raise ValueError(f"rope: position_ids are on {position_ids.device}, q on {q.device}; use one device")
