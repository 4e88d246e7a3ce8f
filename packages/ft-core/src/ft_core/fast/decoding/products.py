"""The products of few rows: linear layers with one input, side by side, with the low-rank updates that are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ft_kernels as kernels
from ft_core.fast.find import NotFast
from ft_core.fast.linears import Linear, base_of, read

__all__ = ["Product"]

ALIGN = 8
"""Ranks are filled up with zeros to a multiple of this, so that rows of A and B begin where matrix units want them."""


class Product:
    """``[M, K]`` → ``[M, N_1 + N_2 + …]`` of linear layers with one input.

    What the weights are is read once; the numbers of updates and biases, which training changes in place, at
    ``refresh()``.

    Raises:
        NotFast: a layer that only its own code can compute.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.modules = list(modules)
        linears = [_read(module, dtype) for module in modules]
        kinds = {type(linear.weight) for linear in linears}
        self.kind = "plain" if kinds <= {Tensor, nn.Parameter} else kinds.pop().__name__ if len(kinds) == 1 else "mixed"
        if self.kind not in ("plain", "NF4Weight", "Int8Weight"):
            raise NotFast("weights of several kinds have one input")
        self.weights: list[Any] = [linear.weight for linear in linears]
        self.sizes = [linear.sizes[0] for linear in linears]
        self.bias = _zeros(linears, dtype) if any(linear.bias is not None for linear in linears) else None
        self.a, self.b = _room(linears, dtype)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Take over the numbers of updates and biases as they are now, into the memory that they have here.

        Recorded steps read them there: it stays the same as long as the product does.
        """
        if self.a is None and self.bias is None:
            return
        row = rank = 0
        for module in self.modules:
            linear = read(module)
            assert linear is not None
            adapter = linear.adapter
            if linear.bias is not None and self.bias is not None:
                self.bias[row : row + linear.sizes[0]] = linear.bias.detach()
            if adapter is not None and self.a is not None and self.b is not None:
                r = adapter.a.shape[0]
                self.a[rank : rank + r] = adapter.a.detach()
                self.b[row : row + linear.sizes[0], rank : rank + r] = adapter.b.detach() * adapter.scaling
                rank += r
            row += linear.sizes[0]

    def __call__(self, x: Tensor, few: bool) -> Tensor:
        """The outputs of all layers, side by side; ``few`` says that the same number of few rows comes again and again,
        so that a kernel may be compiled for it."""
        y = self._frozen(x, few)
        return y if self.a is None or self.b is None else y.addmm_(F.linear(x, self.a), self.b.t())

    def _frozen(self, x: Tensor, few: bool) -> Tensor:
        product: Any = None
        if few and self.kind == "NF4Weight":
            product = kernels.nf4_linear
        elif few and self.kind == "plain" and _is_one_row(x):
            product = kernels.row_linear
        if product is not None:
            y: Tensor = product(x, self.weights)
            return y if self.bias is None else y.add_(self.bias)
        # Looked for at each call: what was found would hold the memory that weights had before somebody moved them.
        whole = _adjacent(self.weights) if self.kind == "plain" else None
        if whole is not None:
            return F.linear(x, whole, self.bias)
        y = x.new_empty(x.shape[0], sum(self.sizes))
        parts = y.split(self.sizes, 1)
        biases = [None] * len(parts) if self.bias is None else self.bias.split(self.sizes)
        for weight, bias, part in zip(self.weights, biases, parts, strict=True):
            weight = _expanded(weight, x.dtype)
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
        return y


def _is_one_row(x: Tensor) -> bool:
    """Whether ft_kernels multiplies it by itself; a bias is then added after rounding, as bitsandbytes' layers do."""
    return x.shape[0] == 1 and x.dtype in (torch.float16, torch.bfloat16)


def _expanded(weight: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, kernels.NF4Weight):
        scales = weight.nested
        return kernels.nf4_dequantize(
            weight.packed, weight.absmax, weight.shape, dtype, weight.blocksize, nested=scales
        )
    if isinstance(weight, kernels.Int8Weight):
        return kernels.int8_dequantize(weight.quantized, weight.scales, dtype)
    found: Tensor = weight
    return found


def _read(module: nn.Module, dtype: torch.dtype) -> Linear:
    linear = read(module)
    name = type(base_of(module)).__name__
    if linear is None:
        raise NotFast(f"a {name} with what is on it can only be computed by its own code")
    if isinstance(linear.weight, Tensor) and (
        type(linear.weight) not in (Tensor, nn.Parameter) or linear.weight.dtype != dtype
    ):
        raise NotFast(f"the weight of a {name} is {linear.weight.dtype} or in pieces, the embedding {dtype}")
    if getattr(getattr(linear.module, "quant_state", None), "packing_format_for_cpu", False):
        raise NotFast("bitsandbytes has packed its weights for this processor")
    if linear.adapter is not None and linear.adapter.dropout:
        raise NotFast("an adapter has dropout: put the model into evaluation mode")
    return linear


def _adjacent(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights as one, where they lie one below the other in memory (:mod:`ft_core.fast.wide`), or are one."""
    first = weights[0]
    if len(weights) == 1:
        return first.detach()
    place = first.storage_offset()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.stride() != first.stride() or weight.storage_offset() != place:
            return None
        place += weight.shape[0] * weight.stride(0)
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def _zeros(linears: Sequence[Linear], dtype: torch.dtype) -> Tensor:
    """Room for all biases; it stays zero where there is none."""
    rows = sum(linear.sizes[0] for linear in linears)
    return torch.zeros(rows, dtype=dtype, device=_device(linears[0].weight))


def _room(linears: Sequence[Linear], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Room for A ``[R, K]`` of all layers, one below the other, and for scaling · B ``[N_1 + …, R]`` in blocks."""
    rank = sum(linear.adapter.a.shape[0] for linear in linears if linear.adapter is not None)
    if not rank:
        return None, None
    rank = -(-rank // ALIGN) * ALIGN
    device = _device(linears[0].weight)
    a = torch.zeros(rank, linears[0].sizes[1], dtype=dtype, device=device)
    return a, torch.zeros(sum(linear.sizes[0] for linear in linears), rank, dtype=dtype, device=device)


def _device(weight: Any) -> torch.device:
    for name in ("packed", "quantized"):
        weight = getattr(weight, name, weight)
    found: torch.device = weight.device
    return found
