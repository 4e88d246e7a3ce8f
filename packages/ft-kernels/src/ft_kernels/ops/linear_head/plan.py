"""How much of the work is done at a time, so that it fits the memory that the caller gives."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ft_kernels.ops.linear_head.products import wide_of

__all__ = ["Needs", "Shape", "held_dtype", "keeps_weight_sum", "least_memory", "plan_rows", "plan_tiles", "row_stride"]


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
    fixed += wide * (needs.bias * shape.vocabulary + needs.a * shape.rank * shape.width)
    fixed += (wide * needs.b + shape.dtype.itemsize) * shape.rank * shape.vocabulary
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
    """Bytes for the sum of the weight's gradients; nothing beyond the gradient itself if that is as wide."""
    return shape.vocabulary * shape.width * wide_of(shape.dtype).itemsize if _narrow(shape) else 0


def keeps_weight_sum(shape: Shape, needs: Needs, max_memory: int) -> bool:
    """Whether the weight's gradient is added up whole while the rows go by; otherwise its own pass makes it."""
    least = min(shape.rows, 256) * _row(shape)
    used = _fixed(shape, needs) + _held(shape, needs, max_memory) + _weight_sum(shape) + least
    return needs.weight and used <= max_memory


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
    if keeps_weight_sum(shape, needs, max_memory):
        used += _weight_sum(shape)
    count = (max_memory - used) // _row(shape)
    return shape.rows if count >= shape.rows else _round_down(count)


def plan_tiles(shape: Shape, max_memory: int) -> tuple[int, int]:
    """For the weight's own pass: columns of the vocabulary, and rows whose logits of those columns exist, at a time."""
    left = max(max_memory - _fixed(shape, Needs()), 0)
    wide = wide_of(shape.dtype).itemsize
    most = max(left // 2 // (shape.width * wide), 1)
    tiles = -(-shape.vocabulary // most)
    columns = -(-shape.vocabulary // tiles)
    columns = min(-(-columns // 128) * 128, most) if most >= 128 else columns
    each = shape._replace(vocabulary=columns)
    row = _row(each) - (shape.width * wide if shape.kernels and _narrow(shape) else 0)
    count = (left - columns * shape.width * wide) // row
    return columns, shape.rows if count >= shape.rows else _round_down(count)
