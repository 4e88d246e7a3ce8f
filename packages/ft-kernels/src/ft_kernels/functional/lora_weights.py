"""Frozen base weights as callers hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ft_kernels.functional.quantization import NestedScales, check_int8, check_nf4, fp8_quantize, nf4_quantize
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

    def __post_init__(self) -> None:
        if self.buffer.dim() != 2 or sum(self.sizes) != self.buffer.shape[0] or self.room < 0:
            raise ValueError(
                f"WideWeight: buffer {list(self.buffer.shape)} does not fit in_features={self.in_features} and sizes "
                f"{list(self.sizes)}; it needs [{sum(self.sizes)}, at least {self.in_features}]"
            )
        if not self.buffer.is_floating_point():
            raise TypeError(f"WideWeight: buffer has dtype {self.buffer.dtype}; use a floating-point dtype")

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

    Raises:
        ValueError: there is no weight, or one that is not ``[N, K]`` with the first one's K.
    """
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    if not parts or any(p.dim() != 2 or p.shape[1:] != parts[0].shape[1:] for p in parts):
        raise ValueError(
            f"widen: the weights have shapes {[list(p.shape) for p in parts]}; give one or more [N, K] with the same K"
        )
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

    Raises:
        TypeError, ValueError: dtypes or sizes do not fit. It is looked at here, once, and not at each product.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    nested: NestedScales | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Sequence) or len(self.shape) != 2:
            raise ValueError(f"NF4Weight: shape is {self.shape!r}; a weight has two sizes, (N, K)")
        check_nf4("NF4Weight", self.packed, self.absmax, torch.Size(self.shape), self.blocksize, self.nested)

    @classmethod
    def quantize(cls, weight: Tensor, blocksize: int = 64, *, nested: bool = True) -> NF4Weight:
        """From numbers ``[N, K]``."""
        packed, absmax, scales = nf4_quantize(weight, blocksize, nested=nested)
        return cls(packed, absmax, (weight.shape[0], weight.shape[1]), blocksize, scales)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of."""
        own, nested = (self.packed, self.absmax), self.nested
        return own if nested is None else (*own, nested.absmax, nested.code, nested.offset)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A frozen weight in bitsandbytes' 8-bit format, expanded for each product.

    Attributes:
        quantized: ``[N, K]``, int8, bitsandbytes' ``CB``. scales: ``[N]``, fp32, its ``SCB``.

    Raises:
        TypeError, ValueError: dtypes or sizes do not fit.
    """

    quantized: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_int8("Int8Weight", self.quantized, self.scales)
        if self.quantized.dim() != 2:
            raise ValueError(f"Int8Weight: quantized has shape {list(self.quantized.shape)}; it needs [N, K]")


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A frozen weight in 8-bit floating point with a scale for each row, multiplied as it is.

    Attributes:
        numbers: ``[N, K]``, e4m3fn. scales: ``[N, 1]``, fp32.
        transposed, transposed_scales: the same of the transposed weight, ``[K, N]`` and ``[K, 1]``, for the product in
            backward. Without them the weight is expanded there, which takes half the memory and more time.

    Raises:
        TypeError, ValueError: dtypes or sizes do not fit.
    """

    numbers: Tensor
    scales: Tensor
    transposed: Tensor | None = None
    transposed_scales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.numbers.dim() != 2:
            raise ValueError(f"Fp8Weight: numbers have shape {list(self.numbers.shape)}; they need [N, K]")
        n, k = self.numbers.shape
        _check_fp8("numbers", self.numbers, self.scales, n, k)
        if self.transposed is not None and self.transposed_scales is not None:
            _check_fp8("transposed", self.transposed, self.transposed_scales, k, n)

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
    parts: list[Any] = list(weight) if isinstance(weight, (list, tuple)) else [weight]
    readers: dict[type, Callable[[str, list[Any]], Base]]
    readers = {Tensor: _plain, WideWeight: _wide, NF4Weight: _nf4, Int8Weight: _int8, Fp8Weight: _fp8}
    for kind, read in readers.items():
        if parts and all(isinstance(p, kind) for p in parts):
            base = read(name, parts)
            break
    else:
        kinds = sorted({type(p).__name__ for p in parts})
        raise TypeError(
            f"{name}: the base weight is made of {kinds}; allowed are tensors [N, K], one WideWeight, or parts that "
            "are all NF4Weight, all Int8Weight or all Fp8Weight"
        )
    if any(t.requires_grad for t in base.tensors):
        raise ValueError(
            f"{name}: the base weight requires a gradient, which is not computed here; freeze it "
            "(requires_grad_(False)), or train it with torch's own linear"
        )
    return base


def _wide(name: str, parts: list[WideWeight]) -> Base:
    if len(parts) > 1:
        raise TypeError(f"{name}: there are {len(parts)} wide weights; widen(parts, rank) makes one of several parts")
    return Base("wide", [parts[0].buffer], parts[0].in_features, list(parts[0].sizes))


def _plain(name: str, parts: list[Tensor]) -> Base:
    for part in parts:
        if part.dim() != 2 or part.shape[1] != parts[0].shape[1]:
            shapes = [list(p.shape) for p in parts]
            raise ValueError(f"{name}: the base weight has shape {shapes}; each part needs [N, K] with the same K")
        if not part.is_floating_point() or part.dtype != parts[0].dtype:
            dtypes = [str(p.dtype) for p in parts]
            raise TypeError(f"{name}: the base weight has dtype {dtypes}; use one floating-point dtype")
    return Base("plain", parts, parts[0].shape[1], [p.shape[0] for p in parts])


def _same_inputs(name: str, widths: list[int]) -> int:
    if len(set(widths)) != 1:
        raise ValueError(f"{name}: the base weight's parts have {widths} inputs; each needs as many")
    return widths[0]


def _nf4(name: str, parts: list[NF4Weight]) -> Base:
    tensors: list[Tensor] = []
    meta: list[int] = []
    for part in parts:
        packed, *tables = (t.contiguous() for t in part.tensors)
        tensors += [packed.view(-1).view(torch.uint8), *tables]
        meta += [part.blocksize, 0 if part.nested is None else part.nested.blocksize]
    return Base("nf4", tensors, _same_inputs(name, [p.shape[1] for p in parts]), [p.shape[0] for p in parts], meta)


def _int8(name: str, parts: list[Int8Weight]) -> Base:
    tensors = [t for p in parts for t in (p.quantized, p.scales.detach().reshape(-1))]
    k = _same_inputs(name, [p.quantized.shape[1] for p in parts])
    return Base("int8", tensors, k, [p.quantized.shape[0] for p in parts])


def _check_fp8(what: str, numbers: Tensor, scales: Tensor, rows: int, columns: int) -> None:
    if numbers.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32:
        raise TypeError(
            f"Fp8Weight: {what} and scales have dtypes {numbers.dtype} and {scales.dtype}, expected "
            "torch.float8_e4m3fn and torch.float32"
        )
    if numbers.shape != (rows, columns) or scales.shape != (rows, 1):
        raise ValueError(
            f"Fp8Weight: {what} {list(numbers.shape)} and scales {list(scales.shape)} do not fit; "
            f"they need [{rows}, {columns}] and [{rows}, 1]"
        )


def _fp8(name: str, parts: list[Fp8Weight]) -> Base:
    tensors: list[Tensor] = []
    both = all(p.transposed is not None and p.transposed_scales is not None for p in parts)
    for part in parts:
        tensors += [part.numbers, part.scales]
        if both and part.transposed is not None and part.transposed_scales is not None:
            tensors += [part.transposed, part.transposed_scales]
    k = _same_inputs(name, [p.numbers.shape[1] for p in parts])
    return Base("fp8", tensors, k, [p.numbers.shape[0] for p in parts], [int(both)])
