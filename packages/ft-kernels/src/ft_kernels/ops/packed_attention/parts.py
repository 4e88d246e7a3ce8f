"""What the kernels of packed attention share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load", "tanh"]


@triton.jit
def tanh(x):
    # By the exponential for large x; where 1 − exp(−2|x|) would cancel, by the series, right to 1e-8 up to 0.25.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def load(pointer, rows, there, stride, D, BLOCK_D: tl.constexpr, MASK: tl.constexpr, DOT: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    address = pointer + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASK:
        tile = tl.load(address, mask=there[:, None] & (cols < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        tile = tl.load(address)
    else:
        tile = tl.load(address, mask=(cols < D)[None, :], other=0.0)
    return tile.to(DOT)
