"""Frozen base weights as callers hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ft_kernels.functional.quantization import NestedScales, fp8_quantize, nf4_quantize
from ft_kernels.ops.lora.operands import Base, width

__all__ = ["BaseWeight", "Fp8Weight", "Int8Weight", "NF4Weight", "Part", "WideWeight", "base_of", "widen"]


@dataclass(frozen=True, eq=False)
class WideWeight:
    """A frozen weight in rows with room for low-rank updates: ``[W | S]``, of which the operations fill S.

    ``weight`` and ``parts()`` are views, meant to be the parameters of plain modules: what is loaded, merged or saved
    there is what the operations compute with. The columns beside them are scratch memory that each operation fills
    before it reads them; two streams must not use one wide weight at the same time.

    Attributes:
        buffer: ``[N, width]``. in_features: K. sizes: the outputs of each projection, which lie one below the other.
    """

    buffer: Tensor
    in_features: int
    sizes: tuple[int, ...]

    @classmethod
    def empty(
        cls,
        sizes: Sequence[int],
        in_features: int,
        rank: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> WideWeight:
        """Uninitialized, with room for adapters of ``rank`` together, to be loaded into."""
        buffer = torch.empty(sum(sizes), width(in_features, rank), dtype=dtype, device=device)
        return cls(buffer, in_features, tuple(sizes))

    @property
    def weight(self) -> Tensor:
        """``[N, K]``, a view."""
        return self.buffer[:, : self.in_features]

    @property
    def room(self) -> int:
        """The most ranks that fit beside the weight."""
        return self.buffer.shape[1] - self.in_features

    def parts(self) -> tuple[Tensor, ...]:
        """Each projection's ``[N_i, K]``, views."""
        return tuple(self.weight.split(self.sizes))


def widen(weight: Tensor | Sequence[Tensor], rank: int) -> WideWeight:
    """Copy a frozen weight, or several with the same input one below the other, into rows with room for updates.

    Args:
        weight: ``[N, K]``, or several such.
        rank: of all adapters of this product together (three of rank 16 on q, k and v: 48).
    """
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    wide = WideWeight.empty(
        [p.shape[0] for p in parts], parts[0].shape[1], rank, dtype=parts[0].dtype, device=parts[0].device
    )
    for target, part in zip(wide.parts(), parts, strict=True):
        target.copy_(part.detach())
    return wide


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A frozen weight in bitsandbytes' NF4 format, expanded for each product (see :func:`ft_kernels.nf4_dequantize`).

    Attributes:
        packed, absmax, blocksize, nested: as ``nf4_dequantize`` takes them. shape: ``(N, K)``.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    nested: NestedScales | None = None

    @classmethod
    def quantize(cls, weight: Tensor, blocksize: int = 64, *, nested: bool = True) -> NF4Weight:
        """From numbers ``[N, K]``."""
        packed, absmax, scales = nf4_quantize(weight, blocksize, nested=nested)
        return cls(packed, absmax, (weight.shape[0], weight.shape[1]), blocksize, scales)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A frozen weight in bitsandbytes' 8-bit format, expanded for each product.

    Attributes:
        quantized: ``[N, K]``, int8, bitsandbytes' ``CB``. scales: ``[N]``, fp32, its ``SCB``.
    """

    quantized: Tensor
    scales: Tensor


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A frozen weight in 8-bit floating point with a scale for each row, multiplied as it is.

    Attributes:
        numbers: ``[N, K]``, e4m3fn. scales: ``[N, 1]``, fp32.
        transposed, transposed_scales: the same of the transposed weight, ``[K, N]`` and ``[K, 1]``, for the product in
            backward. Without them the weight is expanded there, which takes half the memory and more time.
    """

    numbers: Tensor
    scales: Tensor
    transposed: Tensor | None = None
    transposed_scales: Tensor | None = None

    @classmethod
    def quantize(cls, weight: Tensor, *, backward: bool = True) -> Fp8Weight:
        """From numbers ``[N, K]``; ``backward``: with the transposed weight."""
        return cls(*fp8_quantize(weight), *(fp8_quantize(weight.t()) if backward else (None, None)))


Part = Tensor | NF4Weight | Int8Weight | Fp8Weight
"""What one projection's frozen weight may be."""
BaseWeight = Part | WideWeight
"""What a product's frozen weight may be."""


def base_of(name: str, weight: BaseWeight | Sequence[Part]) -> Base:
    """The form in which the operations take a weight."""
    if isinstance(weight, WideWeight):
        return Base("wide", [weight.buffer], weight.in_features, list(weight.sizes))
    parts: list[Any] = list(weight) if isinstance(weight, (list, tuple)) else [weight]
    readers: dict[type, Callable[[str, list[Any]], Base]]
    readers = {Tensor: _plain, NF4Weight: _nf4, Int8Weight: _int8, Fp8Weight: _fp8}
    for kind, read in readers.items():
        if parts and all(isinstance(p, kind) for p in parts):
            return read(name, parts)
    kinds = sorted({type(p).__name__ for p in parts})
    raise TypeError(
        f"{name}: the base weight is made of {kinds}; allowed are tensors [N, K], a WideWeight, or parts that are all "
        "NF4Weight, all Int8Weight or all Fp8Weight"
    )


def _plain(name: str, parts: list[Tensor]) -> Base:
    for part in parts:
        if part.dim() != 2 or part.shape[1] != parts[0].shape[1]:
            shapes = [list(p.shape) for p in parts]
            raise ValueError(f"{name}: the base weight has shape {shapes}; each part needs [N, K] with the same K")
        if not part.is_floating_point() or part.dtype != parts[0].dtype:
            dtypes = [str(p.dtype) for p in parts]
            raise TypeError(f"{name}: the base weight has dtype {dtypes}; use one floating-point dtype")
        if part.requires_grad:
            raise ValueError(
                f"{name}: the base weight requires a gradient, which is not computed here; freeze it "
                "(requires_grad_(False)), or train it with torch's own linear"
            )
    return Base("plain", parts, parts[0].shape[1], [p.shape[0] for p in parts])


def _same_inputs(name: str, widths: list[int]) -> int:
    if len(set(widths)) != 1:
        raise ValueError(f"{name}: the base weight's parts have {widths} inputs; each needs as many")
    return widths[0]


def _nf4(name: str, parts: list[NF4Weight]) -> Base:
    tensors, meta = [], []
    for part in parts:
        tensors += [part.packed.contiguous().view(-1).view(torch.uint8), part.absmax.contiguous()]
        meta += [part.blocksize, 0 if part.nested is None else part.nested.blocksize]
        if part.nested is not None:
            tensors += [part.nested.absmax.contiguous(), part.nested.code.contiguous(), part.nested.offset]
        needed, given = (part.shape[0] * part.shape[1] + 1) // 2, tensors[-5 if part.nested else -2].numel()
        if needed != given:
            raise ValueError(f"{name}: packed has {given} bytes; shape {list(part.shape)} needs {needed}")
    return Base("nf4", tensors, _same_inputs(name, [p.shape[1] for p in parts]), [p.shape[0] for p in parts], meta)


def _int8(name: str, parts: list[Int8Weight]) -> Base:
    for part in parts:
        if part.quantized.dim() != 2 or part.scales.numel() != part.quantized.shape[0]:
            raise ValueError(
                f"{name}: quantized {list(part.quantized.shape)} and scales {list(part.scales.shape)} do not fit; "
                "they need [N, K] and [N]"
            )
    tensors = [t for p in parts for t in (p.quantized, p.scales.detach().reshape(-1))]
    k = _same_inputs(name, [p.quantized.shape[1] for p in parts])
    return Base("int8", tensors, k, [p.quantized.shape[0] for p in parts])


def _fp8(name: str, parts: list[Fp8Weight]) -> Base:
    tensors: list[Tensor] = []
    both = all(p.transposed is not None and p.transposed_scales is not None for p in parts)
    for part in parts:
        n, k = part.numbers.shape
        pairs = [(part.numbers, part.scales, n, k)]
        if both and part.transposed is not None and part.transposed_scales is not None:
            pairs.append((part.transposed, part.transposed_scales, k, n))
        for numbers, scales, rows, columns in pairs:
            if numbers.shape != (rows, columns) or scales.shape != (rows, 1):
                raise ValueError(
                    f"{name}: numbers {list(numbers.shape)} and scales {list(scales.shape)} do not fit; "
                    f"they need [{rows}, {columns}] and [{rows}, 1]"
                )
            tensors += [numbers, scales]
    k = _same_inputs(name, [p.numbers.shape[1] for p in parts])
    return Base("fp8", tensors, k, [p.numbers.shape[0] for p in parts], [int(both)])
