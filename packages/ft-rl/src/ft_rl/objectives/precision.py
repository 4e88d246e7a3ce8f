"""The numbers objectives compute with: never 16 bits, and no infinity where an exponential would overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["bounded_exp", "widen"]


def widen(values: Tensor) -> Tensor:
    """float64 stays; every other type becomes float32."""
    return values if values.dtype == torch.float64 else values.float()


def bounded_exp(values: Tensor) -> Tensor:
    """The exponential, of float32 values of at most 80 and of float64 values of at most 700; above, as at that bound.

    An infinite ratio would turn into NaN where it meets an advantage or a gradient of 0. Above the bound the gradient
    is that at the bound, not 0, so it keeps its direction: exp(80) is 5.5e34, which clipping the gradient then tames.
    """
    result: Tensor = _BoundedExp.apply(values)  # type: ignore[no-untyped-call]
    return result


class _BoundedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        result = values.clamp(max=700.0 if values.dtype == torch.float64 else 80.0).exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result: Tensor = ctx.saved_tensors[0]
        return gradient * result
