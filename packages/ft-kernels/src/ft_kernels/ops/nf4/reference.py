"""NF4 in plain torch, operation by operation what bitsandbytes' CUDA kernels do in fp32.

They are compiled to flush numbers under 2⁻¹²⁶ to zero, and so does this. Quantizing, they divide by absmax through the
GPU's approximate reciprocal, which may be off by one in the last place; this one divides exactly, so that a value that
lies on a threshold but for its last place may come out one code away from theirs (the Triton kernel has the GPU's).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ft_kernels.ops.nf4.format import CODE, NESTED_BLOCKSIZE, dynamic_code, thresholds

__all__ = ["dequantize", "quantize", "scales"]

SMALLEST = 2.0**-126


def _flush(x: Tensor) -> Tensor:
    return torch.where(x.abs() < SMALLEST, x * 0, x)


def scales(
    absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None, nested_blocksize: int
) -> Tensor:
    """The fp32 scale of each block, from 8-bit numbers where scales are quantized too."""
    if absmax2 is None or code2 is None or offset is None:
        return absmax.flatten()
    each = absmax2.flatten().repeat_interleave(nested_blocksize)[: absmax.numel()]
    return _flush(code2[absmax.flatten().int()] * _flush(each)) + offset


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """The values, in ``shape``; packed are the bytes."""
    count = torch.Size(shape).numel()
    numbers = torch.stack((packed >> 4, packed & 15), -1).flatten()[:count]
    values = torch.tensor(CODE, device=packed.device)[numbers.int()]
    each = _flush(scales(absmax, absmax2, code2, offset, nested_blocksize)).repeat_interleave(blocksize)[:count]
    return _flush(values * each).to(dtype).view(tuple(shape))


def _blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The values as fractions of their block's largest magnitude (nan where that is 0), and those magnitudes.

    nan does not count as a magnitude; a block of nothing else has the lowest finite number.
    """
    values = _flush(x.flatten().float())
    values = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    lowest = torch.finfo(torch.float32).min
    absmax = torch.where(values.isnan(), lowest, values.abs()).amax(-1)
    return _flush(values * _flush(1 / absmax)[:, None]), absmax


def quantize(x: Tensor, blocksize: int, nested: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bytes, scales (fp32, or 8-bit numbers), and for these their scales, code and offset; else three empty tensors."""
    if x.numel() == 0:
        fractions, absmax = x.new_empty((0, blocksize), dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    else:
        fractions, absmax = _blocks(x, blocksize)
    numbers = torch.bucketize(fractions, thresholds(x.device))
    numbers = torch.where(fractions.isnan(), 0, numbers).to(torch.uint8).flatten()
    packed = ((numbers[::2] << 4) | numbers[1::2])[: (x.numel() + 1) // 2]
    if not nested:
        nothing = [absmax.new_empty(0) for _ in range(3)]
        return packed, absmax, nothing[0], nothing[1], nothing[2]
    offset = absmax.mean()
    code2 = dynamic_code(x.device).clone()
    absmax, absmax2 = _quantize8(absmax - offset, code2)
    return packed, absmax, absmax2, code2, offset


def _quantize8(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit numbers of the code nearest to x's fractions, and the scales of blocks of ``NESTED_BLOCKSIZE``."""
    if x.numel() == 0:
        return x.to(torch.uint8), x
    fractions, absmax = _blocks(x, NESTED_BLOCKSIZE)
    # A search by halves; of two numbers equally near the one is taken that the search stands on at its end.
    here = torch.full_like(fractions, 127, dtype=torch.int32)
    below, above = torch.zeros_like(here), torch.full_like(here, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        right = fractions > code[here]
        below, above = torch.where(right, here, below), torch.where(right, above, here)
        here = torch.where(right, here + step, here - step)
    right = fractions > code[here]
    beyond = torch.where(right, above, below)
    middle = (code[beyond] + code[here]) * 0.5
    nearer = torch.where(right, fractions > middle, fractions < middle)
    return torch.where(nearer, beyond, here).to(torch.uint8).flatten()[: x.numel()], absmax
