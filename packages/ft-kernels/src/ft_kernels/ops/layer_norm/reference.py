"""Layer normalization in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["layer_norm"]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As :func:`ft_kernels.functional.layer_norm`, differentiable by torch, twice too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], scale, shift, eps).to(x.dtype)
