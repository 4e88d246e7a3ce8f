"""Packed attention in plain torch with the whole mask: quadratic in memory, for tests and tiny inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["packed_attention"]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    together: Tensor | None = None,
) -> Tensor:
    """As :func:`ft_kernels.functional.packed_attention` for ``[T, H, D]``, differentiable by torch, twice too."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(group, 1)
    values = v.to(wide).repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    here = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(here, cu_seqlens.to(q.device).long()[1:], right=True)
    seen = document[:, None] == document[None]
    if causal:
        before = here[:, None] >= here[None]
        if together is not None:
            together = together.to(q.device)
            run = torch.cumsum(~together, 0)  # tokens of a run have one number, that of what is before it
            before = before | (together[:, None] & together[None] & (run[:, None] == run[None]))
        seen = seen & before
    if window is not None:
        seen = seen & (here[:, None] - here[None] < window)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(-1, q.shape[0], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, values).to(q.dtype)
