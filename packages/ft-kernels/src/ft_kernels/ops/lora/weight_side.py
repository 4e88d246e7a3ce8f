"""What stands on the weight's side of a product with low-rank updates: ``[W | S]``, and A stacked.

It is refreshed from the adapters at each use, so that nothing is stale however adapters change or take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.ops.lora.operands import Base, Low

__all__ = ["Ready", "pack", "prepare", "prepare_both", "uses_kernels", "widened_weight"]

SMALL = 128
"""Fewer rows than this are not widened: reading the weight takes the time then, not the passes over rows."""
MOST_RANKS = 128
"""More ranks than this are worth a matrix product of their own."""


def uses_kernels(x: Tensor, rank: int) -> bool:
    """Whether the kernels do the passes over memory: in 16 bits, where the card multiplies them, for usual ranks."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not dispatch.use_triton(x):
        return False
    if tuning.family(x.device) == "turing":
        return x.dtype == torch.float16 and rank <= MOST_RANKS // 4
    return rank <= MOST_RANKS


def pack(low: Low, k: int, columns: Tensor) -> Tensor:
    """A, stacked to ``[low.padded, K]`` in the dtype of ``columns [N, low.padded]``, which get S."""
    if _packs(columns, low):
        from ft_kernels.ops.lora import packing

        return packing.pack(low, k, columns)
    packed = dispatch.allocate((low.padded, k), columns.dtype, columns.device).zero_()
    columns.zero_()
    first = 0
    for a, b, start, scaling in zip(low.a, low.b, low.starts, low.scaling, strict=True):
        packed[first : first + len(a)] = a
        columns[start : start + len(b), first : first + len(a)] = b * scaling
        first += len(a)
    return packed


def _packs(columns: Tensor, low: Low) -> bool:
    """Whether a kernel packs these adapters."""
    known = all(t.dtype in dispatch.KERNEL_DTYPES for t in low.a)
    return uses_kernels(columns, low.padded) and 0 < len(low.a) <= 3 and known


def widened_weight(base: Base, r: int, m: int, dtype: torch.dtype) -> Tensor | None:
    """``[N, ≥ K + r]`` with the weight in its left part, where a widened product is better than two."""
    # In fp32 the sum over K numbers is what rounds; a longer one rounds more than the sum of two.
    if dtype.itemsize > 2 or m < SMALL:
        return None
    return base.widened(r, dtype)


@dataclass(eq=False)
class Ready:
    """What stands on the weight's side of a product, made once for all its rows.

    Attributes:
        base: the weight.
        widened: ``[N, ≥ K + R]``, the weight with S beside it; None where the update is added by itself.
        columns: S, ``[N, R]``. packed: A, ``[R, K]``. None for both without adapters.
    """

    base: Base
    widened: Tensor | None = None
    columns: Tensor | None = None
    packed: Tensor | None = None


def prepare(base: Base, low: Low, m: int, dtype: torch.dtype, *, widen: bool = True) -> Ready:
    """The weight's side of a product of m rows in this dtype; without ``widen`` the weight lies alone."""
    r = low.padded
    if not r:
        return Ready(base)
    widened = widened_weight(base, r, m, dtype) if widen else None
    if widened is None:
        columns = dispatch.allocate((base.n, r), dtype, base.tensors[0].device)
    else:
        columns = widened[:, base.k : base.k + r]
    return Ready(base, widened, columns, pack(low, base.k, columns))


def prepare_both(
    bases: Sequence[Base], lows: Sequence[Low], m: int, dtype: torch.dtype
) -> tuple[Ready | None, Ready | None]:
    """What :func:`prepare` makes of two products, in one launch; None for both where they are better made one by one.

    A quantized weight, which is expanded into memory of its own, waits for its product.
    """
    wide = [b.widened(low.padded, dtype) if b.kind == "wide" else None for b, low in zip(bases, lows, strict=True)]
    if dtype.itemsize > 2 or m < SMALL or any(w is None for w in wide):
        return None, None
    known = [w for w in wide if w is not None]
    columns = [w[:, b.k : b.k + low.padded] for w, b, low in zip(known, bases, lows, strict=True)]
    if not all(_packs(c, low) for c, low in zip(columns, lows, strict=True)):
        return None, None
    from ft_kernels.ops.lora import packing

    packed = packing.pack_two(lows, [b.k for b in bases], columns)
    one, two = (Ready(*each) for each in zip(bases, known, columns, packed, strict=True))
    return one, two
