"""Attention over kept keys and values in plain torch, with the mask written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.ops.rope import reference as rope_reference

__all__ = ["append", "attention"]


def attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int | None, scale: float) -> Tensor:
    """``[B, H, D]``; the arguments are :func:`ft_kernels.decode_attention`'s."""
    b, h, d = q.shape
    s, g = keys.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    here = torch.arange(s, device=q.device)
    seen = here < lengths[:, None]
    if window is not None:
        seen = seen & (here >= lengths[:, None] - window)
    grouped = q.view(b, g, h // g, d).to(wide)
    scores = torch.einsum("bgrd,bsgd->bgrs", grouped, keys.to(wide)) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    # A row that sees nothing has no largest score, and no weights; what lies in unused memory may be anything.
    weights = scores.softmax(-1).masked_fill(~seen[:, None, None], 0.0)
    kept = values.to(wide).masked_fill(~seen[:, :, None, None], 0.0)
    return torch.einsum("bgrs,bsgd->bgrd", weights, kept).reshape(b, h, d).to(q.dtype)


def append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The turned queries ``[B, H, D]``; the arguments are :func:`ft_kernels.rope_append`'s."""
    where = positions.long()
    pairs = q.shape[-1] // 2
    c, s = (table[where, :pairs][None, :, None] for table in (cos, sin))  # [streams, B, one token, pairs]
    q, k = (t[:, 0] for t in rope_reference.rope(q[:, None], k[:, None], c, s, None, [], False, False))
    rows = torch.arange(len(where), device=where.device)
    keys[rows, where], values[rows, where] = k, v
    return q
