"""Quantization to fp8 as a registered torch operation, so that ``torch.compile`` goes through it. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.fp8.reference import scale_like

__all__ = ["fp8_quantize_op"]


@torch.library.custom_op(
    "ft_kernels::fp8_quantize", mutates_args=(), schema="(Tensor x, int scaling) -> (Tensor, Tensor)"
)
def fp8_quantize_op(x: Tensor, scaling: int) -> tuple[Tensor, Tensor]:
    """The e4m3fn numbers and their scales, by the kernel."""
    from ft_kernels.ops.fp8 import kernels

    out = dispatch.allocate(x.shape, torch.float8_e4m3fn, x.device)
    scale = scale_like(x, scaling)
    kernels.quantize(x, scaling, out, scale)
    return out, scale


@fp8_quantize_op.register_fake
def _(x: Tensor, scaling: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale_like(x, scaling)
