"""Normalization layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional import rms_norm

__all__ = ["RMSNorm"]


class RMSNorm(torch.nn.Module):
    """:func:`ft_kernels.rms_norm` with a weight of its own.

    Args:
        hidden_size: H, the size of the last dimension.
        eps: added to the mean square.
        offset: added to the weight. The weight starts at ``1 − offset``, which is the plain norm.
        weight: whether there is one.
        device, dtype: where and what the weight is.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        weight: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.offset = offset
        self.weight: torch.nn.Parameter | None
        if weight:
            self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1 - offset, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., hidden_size]``."""
        return rms_norm(x, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, offset={self.offset}, weight={self.weight is not None}"
