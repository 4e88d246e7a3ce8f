"""What a low-rank product is made of: adapters, dropout, and the base weight in one of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.int8 import reference as int8
from ft_kernels.ops.nf4 import reference as nf4

__all__ = ["Base", "Drop", "Low", "RowNorm", "padded", "row_buffer", "width"]

ALIGN = 64
"""Rows are a multiple of this many elements long: 128 bytes in 16 bits, one line of the second-level cache."""
RANKS = 16
"""Ranks are filled up with zeros to a multiple of this: what tensor cores take at once, and 32 bytes."""


def padded(rank: int) -> int:
    """The rank, filled up."""
    return -(-rank // RANKS) * RANKS


def width(k: int, rank: int) -> int:
    """The length of a row that has room for K numbers and ``rank`` more."""
    return -(-(k + padded(rank)) // ALIGN) * ALIGN


def row_buffer(m: int, k: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[M, width(K, rank)]``, uninitialized."""
    return dispatch.allocate((m, width(k, rank)), dtype, device)


@dataclass(eq=False)
class Low:
    """The adapters of a product with N outputs: the i-th adds ``scaling_i · x A_iᵀ B_iᵀ`` from output ``starts_i`` on.

    Attributes:
        a: ``[r_i, K]`` each. b: ``[n_i, r_i]`` each.
        r: all ranks together. padded: that, filled up.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    starts: Sequence[int]
    scaling: Sequence[float]
    ranks: list[int] = field(init=False)
    sizes: list[int] = field(init=False)
    r: int = field(init=False)
    padded: int = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = [t.shape[0] for t in self.a]
        self.sizes = [t.shape[0] for t in self.b]
        self.r = sum(self.ranks)
        self.padded = padded(self.r)

    def ends(self) -> tuple[int, int]:
        """Where the first and the second adapter's ranks end."""
        return self.ranks[0], sum(self.ranks[:2])

    @property
    def numel(self) -> int:
        """The size of all gradients: of A first, ``[r, K]``, then of each B."""
        return sum(t.numel() for t in self.a) + sum(t.numel() for t in self.b)


@dataclass(eq=False)
class Drop:
    """Dropout of the adapters' input with probability p; adapter i has the random numbers of stream i.

    Attributes:
        first: the number of the input's first row among those that share the seed. Random numbers go by these numbers,
            so that rows computed some at a time are dropped as if they were computed together.
    """

    p: float = 0.0
    seed: Tensor | None = None
    first: int = 0

    def at(self, first: int) -> Drop:
        """The same, for an input whose first row has this number."""
        return Drop(self.p, self.seed, first) if self.p else self

    def arguments(self, other: Tensor) -> tuple[Tensor, int, float, int]:
        """What kernels take: the seed, the smallest number kept, the factor of what is kept, and the first row."""
        return (other if self.seed is None else self.seed), round(self.p * 2**32), 1 / (1 - self.p), self.first


@dataclass(eq=False)
class RowNorm:
    """X of a product as the RMS norm of what is given for it: ``x · rstd · (weight + offset)``, rounded once.

    Attributes:
        weight: ``[K]``. rstd: ``[M]``, fp32. offset: as in :func:`ft_kernels.rms_norm`.
    """

    weight: Tensor
    rstd: Tensor
    offset: float


@dataclass(eq=False)
class Base:
    """A frozen weight ``[N, K]`` as an operation gets it: tensors, and how to read them.

    Attributes:
        kind: ``"wide"`` (one tensor ``[N, ≥ K + R]``, whose further columns are the product's scratch memory),
            ``"plain"`` (``[N_i, K]`` each); of each part ``"nf4"`` (bytes, scales, and with scales in 8 bits three more
            tensors), ``"int8"`` (numbers, scales) or ``"fp8"`` (numbers, scales, maybe both of the transposed part).
        sizes: N_i.
        meta: for nf4 each part's block size and that of its scales (0: they are fp32), for fp8 whether there are
            transposed parts.
    """

    kind: str
    tensors: Sequence[Tensor]
    k: int
    sizes: Sequence[int]
    meta: Sequence[int] = ()

    @property
    def n(self) -> int:
        return sum(self.sizes)

    @property
    def quantized(self) -> bool:
        return self.kind in ("nf4", "int8", "fp8")

    def widened(self, r: int, dtype: torch.dtype) -> Tensor | None:
        """``[N, ≥ K + r]`` whose left part holds the weight, or None if that took a copy of a plain one.

        A quantized weight is expanded into memory that lives as long as the product; the allocator gives the same to
        the next one on this stream.
        """
        if self.kind == "wide":
            return self.tensors[0] if self.tensors[0].shape[1] >= self.k + r else None
        if self.kind in ("nf4", "int8"):
            return self._expanded(row_buffer(self.n, self.k, r, dtype, self.tensors[0].device))
        return None

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The weight as ``[n, K]`` each, one below the other."""
        if self.kind == "wide":
            return [self.tensors[0][:, : self.k]]
        if self.quantized:
            return [self._expanded(dispatch.allocate((self.n, self.k), dtype, self.tensors[0].device))[:, : self.k]]
        return list(self.tensors)

    def expanded(self, r: int, dtype: torch.dtype) -> Base:
        """The same weight with room for r ranks, expanded now and not at each use. Codes in fp8 stay: they multiply."""
        if self.kind not in ("nf4", "int8"):
            return self
        whole = self._expanded(row_buffer(self.n, self.k, r, dtype, self.tensors[0].device))
        return Base("wide", [whole], self.k, [self.n])

    def _expanded(self, target: Tensor) -> Tensor:
        """A quantized weight in the left part of ``[N, ≥ K]``."""
        tensors, numbers = iter(self.tensors), iter(self.meta)
        for part in target[:, : self.k].split(list(self.sizes)):
            if self.kind == "nf4":
                packed, absmax = next(tensors), next(tensors)
                blocksize, nested_blocksize = next(numbers), next(numbers)
                nested = [next(tensors) if nested_blocksize else None for _ in range(3)]
                _expand_nf4(packed, absmax, nested, blocksize, nested_blocksize, part)
            elif self.kind == "int8":
                _expand_int8(next(tensors), next(tensors), part)
            else:
                codes, scales = next(tensors), next(tensors)
                part.copy_(codes.float() * scales)
                for _ in range(2 if self.meta[0] else 0):  # those of the transposed weight
                    next(tensors)
        return target


def _expand_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested: Sequence[Tensor | None],
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> None:
    first, code, offset = nested
    if dispatch.use_triton(out):
        from ft_kernels.ops.nf4 import kernels

        kernels.dequantize(packed, absmax, first, code, offset, blocksize, nested_blocksize, out)
    else:
        scales = (absmax, first, code, offset)
        out.copy_(nf4.dequantize(packed, *scales, out.shape, out.dtype, blocksize, nested_blocksize))


def _expand_int8(quantized: Tensor, scales: Tensor, out: Tensor) -> None:
    if dispatch.use_triton(out):
        from ft_kernels.ops.int8 import kernels

        kernels.dequantize(quantized, scales, out)
    else:
        out.copy_(int8.dequantize(quantized, scales, out.dtype))
