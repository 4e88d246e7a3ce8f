"""Room beside frozen weights for the low-rank updates, so that a product and its update are one product.

A layer's 16-bit weights of one input are copied once into a buffer with a few more columns, and the modules' parameters
become views of it: what is saved, merged or loaded there is what is computed with. Only on a GPU, and only where the
weight lies there whole and frozen. Weights that FSDP2 shards stay where they are: it lends them whole for as long as a
layer computes, and a copy would be all of the model on each GPU again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import ft_kernels as kernels
from ft_core.fast.linears import LENT, Linear, base_of

__all__ = ["Wide"]

ALIGN = 16
"""The products fill ranks up to a multiple of this."""


class Wide:
    """The wide weights of a layer, by the name of their group, made when they are first wanted."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}

    def of(self, group: str, linears: Sequence[Linear]) -> Any:
        """The weight of these layers as the products take it: wide, or a list of what they are."""
        found = [linear.weight for linear in linears]
        rank = sum(linear.adapter.a.shape[0] for linear in linears if linear.adapter is not None)
        if not rank or any(map(_is_lent, linears)) or not all(_can_move(weight) for weight in found):
            return found if len(found) > 1 else found[0]
        rank = -(-rank // ALIGN) * ALIGN
        known = self.weights.get(group)
        if any(hasattr(weight, LENT) for weight in found):  # they may not be there to be looked at, or copied
            if known is not None and known.room >= rank:
                return known
            return found if len(found) > 1 else found[0]
        if known is None or known.room < rank or not _is_view(known, found):
            with torch.inference_mode(
                False
            ):  # a measurement may come first, and what it makes could not be trained with
                known = kernels.widen(found, rank)
            for weight, part in zip(found, known.parts(), strict=True):
                weight.data = part
            self.weights[group] = known
        return known

    def undo(self, parameters: Sequence[Tensor]) -> None:
        """Give parameters that lie in wide weights memory of their own again."""
        buffers = {wide.buffer.untyped_storage().data_ptr() for wide in self.weights.values()}
        for parameter in parameters:
            if parameter.untyped_storage().data_ptr() in buffers:
                parameter.data = parameter.data.contiguous()
        self.weights.clear()


def _is_lent(linear: Linear) -> bool:
    """Whether FSDP2 manages the layer (its own mark), whose weight then looks like any other while it is whole."""
    return getattr(base_of(linear.module), "_is_fsdp_managed_module", False)


def _can_move(weight: Any) -> bool:
    """A plain frozen parameter in 16 bits on a GPU."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and not weight.requires_grad
        and weight.is_cuda
        and weight.dtype in (torch.float16, torch.bfloat16)
    )


def _is_view(wide: Any, weights: Sequence[Tensor]) -> bool:
    return all(
        part.data_ptr() == weight.data_ptr() and part.stride() == weight.stride()
        for part, weight in zip(wide.parts(), weights, strict=True)
    )
