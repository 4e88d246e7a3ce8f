"""What the kernels of products with low-rank updates share: rounding, dropout, and tile sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ft_kernels import tuning
from ft_kernels.dispatch import interpreting

__all__ = ["computed_once", "dot_dtype", "kept", "loads_ahead", "operand", "ranks_block", "rounded", "rounds_by_hand"]


def rounds_by_hand(dtype: torch.dtype) -> bool:
    """Whether stores must be rounded before: triton's interpreter cuts fp32 off when it stores bf16."""
    return interpreting() and dtype == torch.bfloat16


def dot_dtype(x: torch.Tensor) -> tl.dtype:
    """What tl.dot multiplies 16-bit numbers in: the interpreter computes with bf16 wrongly."""
    if x.dtype == torch.float16:
        return tl.float16
    return tl.float32 if interpreting() else tl.bfloat16


@triton.jit
def rounded(value, target, BY_HAND: tl.constexpr):
    """An fp32 value in the dtype of what `target` points to, rounded to nearest."""
    if BY_HAND:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(target.dtype.element_ty)


@triton.jit
def operand(value, INTERPRETED: tl.constexpr):
    """What tl.dot gets: the interpreter cannot multiply bf16."""
    if INTERPRETED:
        value = value.to(tl.float32)
    return value


@triton.jit
def computed_once(value, NATIVE: tl.constexpr):
    """A tile of 16-bit numbers as it is.

    To a product a tile goes in another layout than to memory. The compiler then would rather compute it a second and a
    third time than move it, the exponential function included; across this it has to move it.
    """
    if NATIVE:
        value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=2)
    return value


@triton.jit
def kept(values, seed, rows, cols, threshold, inverse, first_row, STREAM: tl.constexpr):
    """Dropout of a tile, in fp32: the same random number for an element wherever it is computed.

    The rows' random numbers are those of rows from ``first_row`` on.
    """
    rows += first_row
    zero = rows.to(tl.int32) * 0 + cols.to(tl.int32) * 0
    words = tl.philox(tl.load(seed), zero + cols.to(tl.int32), zero + rows.to(tl.int32), zero, zero)
    keep = words[STREAM].to(tl.int64) >= threshold
    return tl.where(keep, values.to(tl.float32) * inverse, 0.0)


def ranks_block(r: int) -> int:
    """The number of ranks that a tile has: a power of two, at least what a matrix instruction takes."""
    return max(16, 1 << (r - 1).bit_length())


def loads_ahead(bytes_a_stage: int, most: int, device: torch.device) -> int:
    """How many tiles can be on their way at once, with some shared memory left for what is in work."""
    if tuning.family(device) == "turing":
        return 1  # loads go by way of registers there, of which there are too few for more
    return max(1, min(most, tuning.shared_memory(device) * 3 // 4 // bytes_a_stage))
