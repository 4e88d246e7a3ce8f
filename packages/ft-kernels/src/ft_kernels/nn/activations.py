"""Gated activations as layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional.activations import Approximate, geglu, swiglu

__all__ = ["GEGLU", "SwiGLU"]


class SwiGLU(torch.nn.Module):
    """:func:`ft_kernels.swiglu`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """``silu(gate) · up`` of ``[..., I]`` each, or of both packed in ``[..., 2·I]``."""
        return swiglu(gate, up)


class GEGLU(torch.nn.Module):
    """:func:`ft_kernels.geglu` with its approximation fixed."""

    def __init__(self, approximate: Approximate = "none") -> None:
        super().__init__()
        self.approximate: Approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """``gelu(gate) · up`` of ``[..., I]`` each, or of both packed in ``[..., 2·I]``."""
        return geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
