"""Rows computed some at a time: which ones, what is made once for all of them, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product as pairs

import torch
from torch import Tensor

from ft_kernels.dispatch import cdiv
from ft_kernels.ops.blocks.parts import Product
from ft_kernels.ops.lora import weight_side
from ft_kernels.ops.lora.operands import Low

__all__ = ["Piece", "Total", "even", "pieces", "prepared", "tiles"]

WHOLE = 128
"""Tiles have a multiple of so many rows where that fits: what a matrix product computes at once."""


def even(count: int, most: int) -> int:
    """Into parts of how many rows, none with more than ``most``, the rows are cut: of nearly one size.

    A last part of a few rows would take nearly as long as a whole one.
    """
    return min(most, cdiv(cdiv(count, cdiv(count, most)), WHOLE) * WHOLE)


def tiles(count: int, most: int) -> list[slice]:
    """The parts, in order."""
    each = even(count, most)
    return [slice(first, min(first + each, count)) for first in range(0, count, each)]


@dataclass(frozen=True)
class Piece:
    """Rows that are some tokens of some sequences.

    Attributes:
        rows: in ``[M, ...]``. batch, tokens: in ``[B, S, ...]``.
    """

    rows: slice
    batch: slice
    tokens: slice

    def of(self, x: Tensor) -> Tensor:
        """Its part of ``[B, S, ...]``."""
        return x[self.batch, self.tokens]


def pieces(batches: int, length: int, most: int) -> list[Piece]:
    """Pieces of at most so many rows, in order: of one sequence, or of whole ones."""
    if length > most:
        parts = pairs(range(batches), tiles(length, most))
        return [Piece(slice(i * length + t.start, i * length + t.stop), slice(i, i + 1), t) for i, t in parts]
    each = cdiv(batches, cdiv(batches, most // length))
    whole = [slice(first, min(first + each, batches)) for first in range(0, batches, each)]
    return [Piece(slice(b.start * length, b.stop * length), b, slice(0, length)) for b in whole]


def prepared(product: Product, low: Low, rows: int, dtype: torch.dtype) -> weight_side.Ready:
    """A product's weight, expanded, with its adapters beside it: once for all tiles of so many rows."""
    return weight_side.prepare(product.base.expanded(low.padded, dtype), low, rows, dtype)


class Total:
    """Gradients of all adapters in one flat tensor, added up over tiles: at least in fp32, in the tiles' order.

    Attributes:
        wide: the dtype of the sum.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.wide = torch.promote_types(dtype, torch.float32)
        self._dtype = dtype
        self._sum: Tensor | None = None

    def add(self, part: Tensor | None) -> None:
        """One tile more, in memory that nobody else reads."""
        if part is not None:
            self._sum = part if self._sum is None else self._sum.add_(part)

    def result(self) -> Tensor | None:
        """The sum in the adapters' dtype; None where no tile had any."""
        return None if self._sum is None else self._sum.to(self._dtype)
