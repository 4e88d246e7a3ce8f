"""The product of one row as a registered torch operation. There are no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["row_linear_op"]


@torch.library.custom_op("ft_kernels::row_linear", mutates_args=(), schema="(Tensor x, Tensor[] weights) -> Tensor")
def row_linear_op(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``[1, sum of N]``, by the kernel."""
    from ft_kernels.ops.row_linear import kernels

    return kernels.product(x, weights)


@row_linear_op.register_fake
def _(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty(1, sum(weight.shape[0] for weight in weights))
