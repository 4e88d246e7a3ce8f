"""Normalization layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional import add_rms_norm, layer_norm, rms_norm

__all__ = ["AddRMSNorm", "LayerNorm", "RMSNorm"]


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


class AddRMSNorm(RMSNorm):
    """:func:`ft_kernels.add_rms_norm` with a weight of its own; its settings are those of :class:`RMSNorm`."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The norm of ``x + residual``, and the sum, ``[..., hidden_size]`` each."""
        return add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)


class LayerNorm(torch.nn.Module):
    """:func:`ft_kernels.layer_norm` with a weight and a bias of its own, which start at 1 and 0.

    Args:
        hidden_size: H, the size of the last dimension.
        eps: added to the variance.
        weight, bias: whether there is one.
        device, dtype: where and what they are.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        weight: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight: torch.nn.Parameter | None
        self.bias: torch.nn.Parameter | None
        for name, wanted, start in (("weight", weight, 1), ("bias", bias, 0)):
            value = torch.full((hidden_size,), float(start), device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if value is None else torch.nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., hidden_size]``."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        has = f"weight={self.weight is not None}, bias={self.bias is not None}"
        return f"{self.hidden_size}, eps={self.eps}, {has}"
