"""How much of the work is done at a time, so that it fits the memory that the caller gives."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ft_kernels.ops.linear_head.products import wide_of

__all__ = [
    "Needs",
    "Shape",
    "WeightWay",
    "held_dtype",
    "least_memory",
    "plan_kept",
    "plan_rows",
    "plan_tiles",
    "row_stride",
    "weight_way",
]

WeightWay = Literal["kept", "sum", "later"]
ENOUGH = 256
"""With fewer rows at a time, going twice through them is faster than adding to a large sum for each few."""


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    a: bool = False
    b: bool = False


class Shape(NamedTuple):
    """What the sizes of everything follow from.

    Attributes:
        rows, width, vocabulary: N, H and V; hidden states are ``[N, H]``, the head ``[V, H]``.
        rank: of the low-rank update, 0 without.
        dtype: of the hidden states and the head.
        kernels: whether kernels turn logits into losses in place; the plain path makes fp32 copies.
    """

    rows: int
    width: int
    vocabulary: int
    rank: int
    dtype: torch.dtype
    kernels: bool


def row_stride(shape: Shape) -> int:
    """Elements from one row of logits to the next, such that each row starts where a 16-byte load may."""
    pack = 16 // shape.dtype.itemsize
    return (shape.vocabulary + pack - 1) // pack * pack


def _narrow(shape: Shape) -> bool:
    return shape.dtype.itemsize < 4


def _row(shape: Shape) -> int:
    """Bytes for one row of logits and what goes with it."""
    wide = wide_of(shape.dtype).itemsize
    row = row_stride(shape) * shape.dtype.itemsize + shape.rank * (2 * wide + 2 * shape.dtype.itemsize)
    if _narrow(shape):
        row += shape.width * wide  # the fp32 gradient of a row, or an fp32 copy of it where there are no kernels
    step = 4 if _narrow(shape) else 8
    return row if shape.kernels else row + 7 * step * shape.vocabulary


def _fixed(shape: Shape, needs: Needs) -> int:
    """Bytes that do not depend on how many rows are done at a time, the two large sums aside."""
    wide = wide_of(shape.dtype).itemsize
    fixed = 48 * shape.rows  # losses, logsumexps and the like
    # Sizes may be symbols, which cannot be multiplied with a bool.
    fixed += wide * (int(needs.bias) * shape.vocabulary + int(needs.a) * shape.rank * shape.width)
    fixed += (wide * int(needs.b) + shape.dtype.itemsize) * shape.rank * shape.vocabulary
    return fixed


def held_dtype(shape: Shape, max_memory: int) -> torch.dtype:
    """The dtype in which a gradient of the hidden states made in forward waits for backward.

    fp32, so that it is rounded once, after the gradient from above is known; 16-bit as the hidden states (and so no
    more than the gradient itself) where fp32 would take over a quarter of the memory.
    """
    wide = wide_of(shape.dtype)
    return wide if shape.rows * shape.width * wide.itemsize <= max_memory // 4 else shape.dtype


def _held(shape: Shape, needs: Needs, max_memory: int) -> int:
    dtype = held_dtype(shape, max_memory)
    return shape.rows * shape.width * dtype.itemsize if needs.hidden and dtype != shape.dtype else 0


def _weight_sum(shape: Shape) -> int:
    """Bytes for the fp32 sum of a 16-bit weight's gradients; one as wide as the weight is the gradient itself."""
    return shape.vocabulary * shape.width * wide_of(shape.dtype).itemsize if _narrow(shape) else 0


def weight_way(shape: Shape, needs: Needs, max_memory: int) -> WeightWay | None:
    """How the weight's gradient is made, the fastest way that fits; None if it is not wanted.

    "kept": the gradient of all logits is kept until what comes from above is known, then multiplied. "sum": products
    with parts of it are added up, whole and in fp32. "later": a pass of its own makes the logits again.
    """
    if not needs.weight:
        return None
    if not _narrow(shape):
        return "sum"  # which is the gradient itself
    used = _fixed(shape, needs) + _held(shape, needs, max_memory)
    tile = min(shape.vocabulary, 1024) * shape.width * wide_of(shape.dtype).itemsize
    if used + shape.rows * _row(shape) + tile <= max_memory:
        return "kept"
    return "sum" if used + _weight_sum(shape) + min(shape.rows, ENOUGH) * _row(shape) <= max_memory else "later"


def least_memory(shape: Shape, needs: Needs) -> int:
    """The least number of bytes that does."""
    least = _fixed(shape, needs) + _row(shape)
    return least * 4 // 3 + 1 if _narrow(shape) and needs.hidden else least


def _round_down(count: int) -> int:
    """To a power of two: matrix products like those, and so do row counts that are ones themselves."""
    return 1 << (max(count, 1).bit_length() - 1)


def plan_rows(shape: Shape, needs: Needs, max_memory: int) -> int:
    """How many rows' logits exist at a time."""
    used = _fixed(shape, needs) + _held(shape, needs, max_memory)
    if weight_way(shape, needs, max_memory) == "sum":
        used += _weight_sum(shape)
    count = (max_memory - used) // _row(shape)
    return shape.rows if count >= shape.rows else _round_down(count)


def plan_kept(shape: Shape, needs: Needs, max_memory: int) -> int:
    """While all logits' gradient is kept: columns of the vocabulary that are multiplied at a time."""
    used = _fixed(shape, needs) + _held(shape, needs, max_memory) + shape.rows * _row(shape)
    return _even(shape.vocabulary, (max_memory - used) // (shape.width * wide_of(shape.dtype).itemsize))


def plan_tiles(shape: Shape, max_memory: int) -> tuple[int, int]:
    """For the weight's own pass: columns of the vocabulary, and rows whose logits of those columns exist, at a time."""
    left = max(max_memory - _fixed(shape, Needs()), 0)
    wide = wide_of(shape.dtype).itemsize
    columns = _even(shape.vocabulary, left // 2 // (shape.width * wide))
    each = shape._replace(vocabulary=columns)
    row = _row(each) - (shape.width * wide if shape.kernels and _narrow(shape) else 0)
    count = (left - columns * shape.width * wide) // row
    return columns, shape.rows if count >= shape.rows else _round_down(count)


def _even(count: int, most: int) -> int:
    """The size of parts of about the same size, none over ``most``; a multiple of 128 where that fits."""
    most = max(most, 1)
    parts = -(-count // most)
    size = -(-count // parts)
    return min(-(-size // 128) * 128, most) if 128 <= most < count else size
