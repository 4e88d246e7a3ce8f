"""Sums of rows in torch, for any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sum_rows"]


def sum_rows(x: Tensor, index: Tensor) -> Tensor:
    """See :func:`ft_kernels.ops.shared_rows.autograd.sum_rows`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros((index.shape[0], *x.shape[1:]), dtype=wide)
    for column in index.unbind(1):
        there = (column >= 0).view(-1, *[1] * (x.dim() - 1))
        total = total + torch.where(there, x.index_select(0, column.clamp(min=0)), 0)
    return total.to(x.dtype)
