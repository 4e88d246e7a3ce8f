"""8-bit weights as registered torch operations, so that ``torch.compile`` goes through the kernel. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels import dispatch

__all__ = ["int8_dequantize_op", "int8_dequantize_out_op"]


@torch.library.custom_op(
    "ft_kernels::int8_dequantize",
    mutates_args=(),
    schema="(Tensor quantized, Tensor scales, ScalarType dtype) -> Tensor",
)
def int8_dequantize_op(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a new tensor, by the kernel."""
    from ft_kernels.ops.int8 import kernels

    return kernels.dequantize(quantized, scales, dispatch.allocate(quantized.shape, dtype, quantized.device))


@int8_dequantize_op.register_fake
def _(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return quantized.new_empty(quantized.shape, dtype=dtype)


@torch.library.custom_op(
    "ft_kernels::int8_dequantize_out",
    mutates_args={"out"},
    schema="(Tensor quantized, Tensor scales, Tensor(a!) out) -> ()",
)
def int8_dequantize_out_op(quantized: Tensor, scales: Tensor, out: Tensor) -> None:
    """The values written to ``out``, of any strides, by the kernel."""
    from ft_kernels.ops.int8 import kernels

    kernels.dequantize(quantized, scales, out)


@int8_dequantize_out_op.register_fake
def _(quantized: Tensor, scales: Tensor, out: Tensor) -> None:
    return None
