"""Quantization to 8-bit floating point in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ft_kernels import dispatch

__all__ = ["LARGEST", "SCALINGS", "SMALLEST_SCALE", "quantize", "scale_like"]

SCALINGS = ("row", "1x128", "128x128")
"""Which values share a scale; the operation knows them by their number here."""

LARGEST = 448.0
"""The largest number of e4m3fn."""
SMALLEST_SCALE = 2.0**-126


def scale_like(x: Tensor, scaling: int) -> Tensor:
    """Uninitialized memory for the scales of x, laid out as ``torch._scaled_mm`` wants them."""
    groups = (x.shape[-1] + 127) // 128
    if scaling == 0:
        return dispatch.allocate((*x.shape[:-1], 1), torch.float32, x.device)
    if scaling == 1:  # one group after the other: of a group the scales of all rows lie side by side
        rows = x.shape[:-1].numel()
        return dispatch.allocate((groups, rows), torch.float32, x.device).t().view(*x.shape[:-1], groups)
    # Rows of blocks start at multiples of four numbers.
    down, across = (x.shape[0] + 127) // 128, (groups + 3) // 4 * 4
    return dispatch.allocate((down, across), torch.float32, x.device)[:, :groups]


def quantize(x: Tensor, scaling: int) -> tuple[Tensor, Tensor]:
    """The e4m3fn numbers and their fp32 scales; see :func:`ft_kernels.functional.quantization.fp8_quantize`."""
    scale = scale_like(x, scaling)
    values = x.float()
    if x.numel() == 0:
        return x.to(torch.float8_e4m3fn), scale.fill_(SMALLEST_SCALE)
    if scaling == 0:
        amax, each = values.abs().amax(-1, keepdim=True), None
    else:
        down, across = (128 if scaling == 2 else 1), 128
        grid = values if scaling == 2 else values.flatten(0, -2)
        rows, columns = grid.shape
        padded = F.pad(grid, (0, -columns % across, 0, -rows % down))
        blocks = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
        amax = blocks.abs().amax((1, 3)).view(scale.shape)
        each = (rows, columns, down)
    exact = amax * (1 / LARGEST)
    scale.copy_(torch.where(exact < SMALLEST_SCALE, SMALLEST_SCALE, exact))
    inverse = 1 / scale
    if each is not None:
        rows, columns, down = each
        inverse = inverse.reshape(-1, inverse.shape[-1]).repeat_interleave(down, 0)[:rows]
        inverse = inverse.repeat_interleave(128, 1)[:, :columns].view(values.shape)
    return (values * inverse).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
