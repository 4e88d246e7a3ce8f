"""Normalization over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.layer_norm import reference as layer_norm_reference
from ft_kernels.ops.layer_norm.autograd import layer_norm_op, layer_norm_out_op
from ft_kernels.ops.rms_norm import reference as rms_norm_reference
from ft_kernels.ops.rms_norm.autograd import add_rms_norm_op, add_rms_norm_out_op, rms_norm_op, rms_norm_out_op

__all__ = ["add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """``x / sqrt(mean(x², last dimension) + eps) · (weight + offset)``, rounded once.

    Root Mean Square Layer Normalization, equation 4 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        x: ``[..., H]``, floating point, any strides, possibly empty.
        weight: ``[H]``, floating point, or None for no scale. Its dtype may differ from x's.
        eps: added to the mean square.
        offset: added to the weight; 1 for families that store it around zero (Gemma).
        out: where to write the result, x's shape and dtype, any strides: ``wider[..., :H]`` is written without a copy.
            It records no gradients.

    Returns:
        ``[..., H]`` in x's dtype, whatever the weight's; ``out``, or else contiguous where a kernel made it. Arithmetic
        is fp32 for 16-bit inputs; for fp32 it is float64 in the kernel and fp32 in the reference. Gradients come back
        for x and weight.

    Raises:
        TypeError: x or weight is not floating point, or out has another dtype than x.
        ValueError: shapes or devices do not fit, or an offset is given without a weight.
        RuntimeError: out is given where gradients would be recorded.
    """
    _check("rms_norm", x, offset=offset, weight=weight)
    eps, offset = float(eps), float(offset)
    if out is not None:
        _check_out("rms_norm", out, x, weight)
        if use_triton(x, weight):
            rms_norm_out_op(x, weight, eps, offset, out)
            return out
        return out.copy_(rms_norm_reference.rms_norm(x, weight, eps, offset))
    if use_triton(x, weight):
        y: Tensor = rms_norm_op(x, weight, eps, offset)[0]
        return y
    return rms_norm_reference.rms_norm(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm in one pass: ``total = x + residual``, ``rms_norm(total, weight, eps)``.

    The sum is rounded to x's dtype, as torch rounds it, and the norm is of the rounded sum.

    Args:
        x, residual: ``[..., H]``, floating point of one dtype, any strides, possibly empty.
        weight, eps, offset: as in :func:`rms_norm`.
        out: where to write the norm, as in :func:`rms_norm`.

    Returns:
        The norm and the sum, ``[..., H]`` each in x's dtype. Gradients come back through both, for x, residual (the
        same one) and weight.

    Raises:
        TypeError: an input is not floating point, or dtypes of x, residual and out differ.
        ValueError: shapes or devices do not fit, or an offset is given without a weight.
        RuntimeError: out is given where gradients would be recorded.
    """
    _check("add_rms_norm", x, offset=offset, weight=weight)
    _check_like("add_rms_norm", "residual", residual, x)
    eps, offset = float(eps), float(offset)
    if out is not None:
        _check_out("add_rms_norm", out, x, residual, weight)
        if use_triton(x, residual, weight):
            return out, add_rms_norm_out_op(x, residual, weight, eps, offset, out)
        normed, total = rms_norm_reference.add_rms_norm(x, residual, weight, eps, offset)
        return out.copy_(normed), total
    if use_triton(x, residual, weight):
        y, total, _ = add_rms_norm_op(x, residual, weight, eps, offset)
        return y, total
    return rms_norm_reference.add_rms_norm(x, residual, weight, eps, offset)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``(x − mean) / sqrt(variance + eps) · weight + bias`` over the last dimension, rounded once.

    Layer Normalization, equation 3 (Ba, Kiros and Hinton 2016, arXiv:1607.06450); the variance is the biased one.

    Args:
        x: ``[..., H]``, floating point, any strides, possibly empty.
        weight: ``[H]``, floating point, or None for no scale. Its dtype may differ from x's.
        bias: ``[H]``, floating point, or None for none. Its dtype may differ from x's.
        eps: added to the variance.
        out: where to write the result, x's shape and dtype, any strides: ``wider[..., :H]`` is written without a copy.
            It records no gradients.

    Returns:
        ``[..., H]`` in x's dtype; ``out``, or else contiguous where a kernel made it. Arithmetic is fp32 for 16-bit
        inputs; for fp32 it is float64 in the kernel and fp32 in the reference. Gradients come back for x, weight and
        bias.

    Raises:
        TypeError: x, weight or bias is not floating point, or out has another dtype than x.
        ValueError: shapes or devices do not fit.
        RuntimeError: out is given where gradients would be recorded.
    """
    _check("layer_norm", x, weight=weight, bias=bias)
    eps = float(eps)
    if out is not None:
        _check_out("layer_norm", out, x, weight, bias)
        if use_triton(x, weight, bias):
            layer_norm_out_op(x, weight, bias, eps, out)
            return out
        return out.copy_(layer_norm_reference.layer_norm(x, weight, bias, eps))
    if use_triton(x, weight, bias):
        y: Tensor = layer_norm_op(x, weight, bias, eps)[0]
        return y
    return layer_norm_reference.layer_norm(x, weight, bias, eps)


def _check(name: str, x: Tensor, *, offset: float = 0.0, **parameters: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: x has dtype {x.dtype}; use a floating-point dtype")
    if x.dim() == 0:
        raise ValueError(f"{name}: x has no dimension to normalize over; give it the shape [..., H]")
    if offset and parameters["weight"] is None:
        raise ValueError(f"{name}: offset={offset} is added to the weight, but weight is None; pass a weight")
    for what, parameter in parameters.items():
        if parameter is None:
            continue
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: {what} has dtype {parameter.dtype}; use a floating-point dtype")
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {what} has shape {list(parameter.shape)}; x needs {list(x.shape[-1:])}")
        if parameter.device != x.device:
            raise ValueError(f"{name}: {what} is on {parameter.device}, x on {x.device}; move them to one device")


def _check_like(name: str, what: str, other: Tensor, x: Tensor) -> None:
    if other.shape != x.shape:
        raise ValueError(f"{name}: {what} has shape {list(other.shape)}, x {list(x.shape)}; they must be the same")
    if other.dtype != x.dtype:
        raise TypeError(f"{name}: {what} has dtype {other.dtype}, x {x.dtype}; use one dtype")
    if other.device != x.device:
        raise ValueError(f"{name}: {what} is on {other.device}, x on {x.device}; move them to one device")


def _check_out(name: str, out: Tensor, x: Tensor, *others: Tensor | None) -> None:
    _check_like(name, "out", out, x)
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{name}: out repeats elements (expanded, stride 0); use memory of its own for each element")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, x, *others)):
        raise RuntimeError(
            f"{name}: out= cannot record gradients, but an input requires them; use torch.no_grad() or leave out away"
        )
