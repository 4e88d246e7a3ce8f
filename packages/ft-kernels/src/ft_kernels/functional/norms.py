"""Normalization over the last dimension."""

from __future__ import annotations

from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.rms_norm import reference as rms_norm_reference
from ft_kernels.ops.rms_norm.autograd import rms_norm_op

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x², last dimension) + eps) · (weight + offset)``, rounded once.

    Root Mean Square Layer Normalization, equation 4 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: ``[..., H]``, floating point, any strides, possibly empty.
        weight: ``[H]``, floating point, or None for no scale. Its dtype may differ from x's.
        eps: added to the mean square.
        offset: added to the weight; 1 for families that store it around zero (Gemma).

    Returns:
        ``[..., H]`` in x's dtype, whatever the weight's; contiguous where a kernel made it. Arithmetic is fp32 for
        16-bit inputs; for fp32 it is float64 in the kernel and fp32 in the reference. Gradients come back for x and
        weight.

    Raises:
        TypeError: x or weight is not floating point.
        ValueError: shapes or devices do not fit, or an offset is given without a weight.
    """
    if not x.is_floating_point():
        raise TypeError(f"rms_norm: x has dtype {x.dtype}; use a floating-point dtype")
    if x.dim() == 0:
        raise ValueError("rms_norm: x has no dimension to normalize over; give it the shape [..., H]")
    if weight is None:
        if offset:
            raise ValueError(f"rms_norm: offset={offset} is added to the weight, but weight is None; pass a weight")
    elif not weight.is_floating_point():
        raise TypeError(f"rms_norm: weight has dtype {weight.dtype}; use a floating-point dtype")
    elif weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {list(weight.shape)}; x needs {list(x.shape[-1:])}")
    elif weight.device != x.device:
        raise ValueError(f"rms_norm: weight is on {weight.device}, x on {x.device}; move them to one device")
    if use_triton(x, weight):
        y: Tensor = rms_norm_op(x, weight, float(eps), float(offset))[0]
        return y
    return rms_norm_reference.rms_norm(x, weight, float(eps), float(offset))
