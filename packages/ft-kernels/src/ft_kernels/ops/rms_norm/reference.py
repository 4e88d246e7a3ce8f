"""RMS normalization in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """As :func:`ft_kernels.functional.rms_norm`, differentiable by torch, twice too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (weight.to(wide) + offset if offset else weight.to(wide))
    return h.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """As :func:`ft_kernels.functional.add_rms_norm`, differentiable by torch, twice too."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total
