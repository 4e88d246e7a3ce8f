"""The product of few rows as a registered torch operation. There are no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MOST_PARTS", "TENSORS", "nf4_linear_op"]

MOST_PARTS = 3
"""Weights with one input that a launch can take, here and of 16-bit ones (``row_linear``)."""
TENSORS = 5
"""Tensors of a weight: bytes, absmax, and absmax2, code2 and offset, or absmax again in their places."""


@torch.library.custom_op(
    "ft_kernels::nf4_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] tensors, int[] sizes, int blocksize, int nested_blocksize) -> Tensor",
)
def nf4_linear_op(
    x: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], blocksize: int, nested_blocksize: int
) -> Tensor:
    """``[M, sum of sizes]``, by the kernel, of ``TENSORS`` tensors for each weight."""
    from ft_kernels.ops.nf4_linear import kernels

    parts = [tensors[TENSORS * i : TENSORS * (i + 1)] for i in range(len(sizes))]
    return kernels.product(x, parts, sizes, blocksize, nested_blocksize)


@nf4_linear_op.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], blocksize: int, nested_blocksize: int) -> Tensor:
    return x.new_empty(x.shape[0], sum(sizes))
