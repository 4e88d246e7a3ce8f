"""The product in plain torch: each weight expanded in the rows' dtype, then multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["product"]


def product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``x [M, K]`` times the transposed weights ``[N, K]``, side by side: ``[M, sum of N]``."""
    y = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    begin = 0
    for weight in weights:
        torch.mm(x, weight.t(), out=y[:, begin : begin + weight.shape[0]])
        begin += weight.shape[0]
    return y
