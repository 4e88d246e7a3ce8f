"""Attention over kept keys and values in plain torch, with the mask written out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention"]


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
