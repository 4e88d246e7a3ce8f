"""Activations with a gate."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.glu import reference
from ft_kernels.ops.glu.autograd import glu_op, glu_out_op

__all__ = ["Approximate", "geglu", "swiglu"]

Approximate = Literal["none", "tanh"]


def swiglu(gate: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``silu(gate) · up``, rounded once, where ``silu(x) = x · sigmoid(x)``.

    GLU Variants Improve Transformer, equation 5 with β = 1 (Shazeer 2020, arXiv:2002.05202). Only gate and up are kept
    for the backward pass.

    Args:
        gate: ``[..., I]``, floating point, any strides, possibly empty; or packed, ``[..., 2·I]`` with gate in the
            first half of the last dimension and up in the second, which are read where they lie.
        up: ``[..., I]`` of gate's dtype, any strides; None for a packed gate.
        out: where to write the result, ``[..., I]`` of gate's dtype, any strides: ``wider[..., :I]`` is written without
            a copy. It records no gradients.

    Returns:
        ``[..., I]`` in gate's dtype; ``out``, or else contiguous where a kernel made it. Arithmetic is fp32 for 16-bit
        inputs; for fp32 it is float64 in the kernel and fp32 in the reference. Gradients come back for gate and up, in
        one packed tensor for a packed gate.

    Raises:
        TypeError: gate is not floating point, or dtypes differ.
        ValueError: shapes or devices do not fit, or a packed gate's last dimension is odd.
        RuntimeError: out is given where gradients would be recorded.
    """
    return _glu("swiglu", gate, up, reference.KINDS.index("silu"), out)


def geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: Approximate = "none", out: Tensor | None = None
) -> Tensor:
    """``gelu(gate) · up``, rounded once, where ``gelu(x) = x · Φ(x)`` with Φ the normal distribution.

    GLU Variants Improve Transformer, equation 5 (Shazeer 2020, arXiv:2002.05202); GELU and its approximation
    ``x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 x³)))``: Hendrycks and Gimpel 2016, section 2 (arXiv:1606.08415).

    Args:
        gate, up, out: as in :func:`swiglu`.
        approximate: ``"tanh"`` for the approximation, ``"none"`` for Φ itself.

    Returns:
        As :func:`swiglu`.

    Raises:
        ValueError: also for an approximation of another name; the rest as in :func:`swiglu`.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate={approximate!r}; allowed are 'none' and 'tanh'")
    return _glu("geglu", gate, up, reference.KINDS.index("gelu_tanh" if approximate == "tanh" else "gelu"), out)


def _glu(name: str, gate: Tensor, up: Tensor | None, kind: int, out: Tensor | None) -> Tensor:
    if not gate.is_floating_point():
        raise TypeError(f"{name}: gate has dtype {gate.dtype}; use a floating-point dtype")
    if gate.dim() == 0:
        raise ValueError(f"{name}: gate has no dimension; give it the shape [..., I], or [..., 2I] with up in it")
    shape = gate.shape
    if up is None:
        if shape[-1] % 2:
            raise ValueError(
                f"{name}: gate has shape {list(shape)} and up is None, but the last dimension of a packed gate and up "
                "is even; pass up, or pack both"
            )
        shape = torch.Size((*shape[:-1], shape[-1] // 2))
    else:
        _check_like(name, "up", up, gate, shape)
    if out is None:
        if use_triton(gate, up):
            h: Tensor = glu_op(gate, up, kind)
            return h
        return reference.glu(gate, up, kind)
    _check_like(name, "out", out, gate, shape)
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{name}: out repeats elements (expanded, stride 0); use memory of its own for each element")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (gate, up, out)):
        raise RuntimeError(
            f"{name}: out= cannot record gradients, but an input requires them; use torch.no_grad() or leave out away"
        )
    if use_triton(gate, up):
        glu_out_op(gate, up, kind, out)
        return out
    return out.copy_(reference.glu(gate, up, kind))


def _check_like(name: str, what: str, other: Tensor, gate: Tensor, shape: torch.Size) -> None:
    if other.shape != shape:
        raise ValueError(f"{name}: {what} has shape {list(other.shape)}; gate {list(gate.shape)} needs {list(shape)}")
    if other.dtype != gate.dtype:
        raise TypeError(f"{name}: {what} has dtype {other.dtype}, gate {gate.dtype}; use one dtype")
    if other.device != gate.device:
        raise ValueError(f"{name}: {what} is on {other.device}, gate on {gate.device}; move them to one device")
