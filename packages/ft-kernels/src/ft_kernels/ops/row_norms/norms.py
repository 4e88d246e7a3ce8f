"""The norm of each row of a weight in any form, with its low-rank updates: no autograd, no checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.lora import weight_side
from ft_kernels.ops.lora.operands import Base, Low
from ft_kernels.ops.lora.reference import row_norms as reference_norms

__all__ = ["row_norms"]


def row_norms(base: Base, low: Low, dtype: torch.dtype) -> Tensor:
    """``‖W + scaling B A‖`` of each row ``[N]``, at least in fp32; without an update in rows that no adapter has."""
    weights = base.dense(dtype)
    columns = dispatch.allocate((base.n, low.padded), dtype, weights[0].device)
    packed = weight_side.pack(low, base.k, columns)
    norms = []
    for weight, up in zip(weights, columns.split([w.shape[0] for w in weights]), strict=True):
        if weight_side.uses_kernels(weight, low.padded) and weight.stride(-1) == 1 and weight.numel():
            from ft_kernels.ops.row_norms import kernels

            norms.append(kernels.row_norms(weight, up, packed))
        else:
            norms.append(reference_norms(weight, packed, up, 1.0))
    return torch.cat(norms) if len(norms) > 1 else norms[0]
