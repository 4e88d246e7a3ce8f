"""What both halves of a layer are made of: their norm, their products, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.lora import weight_side
from ft_kernels.ops.lora.operands import Base, Drop, Low, RowNorm, row_buffer
from ft_kernels.ops.lora.weight_side import Ready
from ft_kernels.ops.refusals import refuse_twice

__all__ = [
    "Norm",
    "Product",
    "drops",
    "normed",
    "normed_backward",
    "normed_copied",
    "ready_both",
    "refuse_twice",
    "row_norm",
    "split_adapters",
]

ADDS = ("wide", "nf4", "int8")
"""Weights whose product with the update inside adds a residual, too."""


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm with a frozen weight, as :func:`ft_kernels.rms_norm` computes it.

    Attributes:
        weight: ``[H]``, or ``[head_dim]`` for a norm of heads.
        eps: added to the mean square.
        offset: added to the weight; 1 for families that store it around zero (Gemma).
    """

    weight: Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Product:
    """A frozen weight with what does not change of its adapters.

    Attributes:
        starts, scaling: of each adapter that there is, as ``Low`` has them.
        bias: ``[N]`` in the weight's dtype, or None.
    """

    base: Base
    starts: Sequence[int]
    scaling: Sequence[float]
    bias: Tensor | None

    def low(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Low:
        return Low(a, b, self.starts, self.scaling)


def split_adapters(products: Sequence[Product], adapters: Sequence[Any]) -> list[tuple[Any, Any]]:
    """a and b of each product from all in one list: a and b of the first, a and b of the second."""
    pairs, place = [], 0
    for product in products:
        count = len(product.starts)
        pairs.append((adapters[place : place + count], adapters[place + count : place + 2 * count]))
        place += 2 * count
    return pairs


def drops(dropout: float, seed: Tensor | None) -> tuple[Drop, Drop]:
    """The dropout of the first and of the second product's input."""
    first, second = (Drop(dropout, None if seed is None else seed[i : i + 1]) for i in range(2))
    return first, second


def normed(x: Tensor, norm: Norm, low: Low) -> tuple[Tensor, Tensor]:
    """A row buffer with the norm of x ``[M, H]`` in its left part, its tail not filled, and 1/rms ``[M]``."""
    from ft_kernels.ops.rms_norm import kernels

    m, h = x.shape
    row = row_buffer(m, h, low.padded, x.dtype, x.device)
    _, rstd, _ = kernels.forward(x, norm.weight, norm.eps, norm.offset, out=row[:, :h])
    return row, rstd


def normed_copied(x: Tensor, norm: Norm, low: Low, last: Product) -> tuple[Tensor, Tensor, Tensor, bool]:
    """:func:`normed`, and x as the residual of the block's last product, with whether that may be written over.

    A product adds to what lies where its result goes, so without a copy that the norm makes of x as it reads it, torch
    makes one, and reads x once more.
    """
    from ft_kernels.ops.rms_norm import kernels

    m, h = x.shape
    copy = m >= weight_side.SMALL and x.dtype.itemsize <= 2 and last.bias is None and last.base.kind in ADDS
    row = row_buffer(m, h, low.padded, x.dtype, x.device)
    _, rstd, copied = kernels.forward(x, norm.weight, norm.eps, norm.offset, out=row[:, :h], copy=copy)
    return row, rstd, x if copied is None else copied, copied is not None


def ready_both(one: Product, two: Product, first: Low, second: Low, x: Tensor) -> tuple[Ready | None, Ready | None]:
    """The weights' side of both products of a block on x, made at once where that costs no memory."""
    return weight_side.prepare_both((one.base, two.base), (first, second), x.shape[0], x.dtype)


def normed_backward(
    dn: Tensor, x: Tensor, norm: Norm, rstd: Tensor, residual: Tensor, out: Tensor | None = None
) -> Tensor:
    """The gradient of x ``[M, H]``: through its norm, from ``dn``, and past it, ``residual``; rounded once."""
    from ft_kernels.ops.rms_norm import kernels

    dx = dispatch.allocate(x.shape, x.dtype, x.device) if out is None else out
    return kernels.backward(dn, x, norm.weight, rstd, norm.offset, False, residual, dx)[0]


def row_norm(norm: Norm, rstd: Tensor) -> RowNorm:
    """The norm for a kernel that makes normed rows as it reads x."""
    return RowNorm(norm.weight, rstd, norm.offset)
