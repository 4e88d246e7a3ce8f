"""Checks of what callers give to the products with low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ft_kernels.ops.lora.operands import Base, padded

__all__ = ["Adapters", "check_product", "draw_seed", "numbers"]


class Adapters:
    """Checked adapters of one product."""

    def __init__(
        self,
        name: str,
        a: list[Tensor],
        b: list[Tensor],
        starts: list[int],
        scaling: list[float],
        outputs: list[int],
    ) -> None:
        if len(a) != len(b):
            raise ValueError(f"{name}: there are {len(a)} a and {len(b)} b; each adapter needs both")
        self.a, self.b, self.starts, self.scaling = a, b, starts, scaling
        for down, up, n in zip(a, b, outputs, strict=True):
            if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or up.shape[0] != n:
                raise ValueError(
                    f"{name}: a {list(down.shape)} and b {list(up.shape)} do not fit; a needs [r, K] and b [{n}, r]"
                )
        dtypes = {t.dtype for t in (*a, *b)}
        if len(dtypes) > 1 or any(not dtype.is_floating_point for dtype in dtypes):
            raise TypeError(
                f"{name}: adapters have dtypes {sorted(map(str, dtypes))}; use one floating-point dtype for all"
            )

    @classmethod
    def some(
        cls,
        name: str,
        a: Sequence[Tensor | None],
        b: Sequence[Tensor | None],
        sizes: Sequence[int],
        scaling: Sequence[float],
    ) -> Adapters:
        """Those of projections side by side, some of which have none."""
        if any((down is None) != (up is None) for down, up in zip(a, b, strict=True)):
            raise ValueError(f"{name}: a projection has only one of a and b; give both, or None for both")
        kept = [i for i in range(len(sizes)) if a[i] is not None]
        starts = [sum(sizes[:i]) for i in kept]
        downs, ups = [t for t in a if t is not None], [t for t in b if t is not None]
        return cls(name, downs, ups, starts, [scaling[i] for i in kept], [sizes[i] for i in kept])


def numbers(name: str, scaling: float | Sequence[float], count: int) -> list[float]:
    """A number for each adapter."""
    numbers = [float(s) for s in scaling] if isinstance(scaling, Sequence) else [float(scaling)] * count
    if len(numbers) != count:
        raise ValueError(
            f"{name}: scaling has {len(numbers)} numbers for {count} adapters; give one number, or one for each"
        )
    return numbers


def _input(name: str, x: Tensor, base: Base, dtype: torch.dtype | None) -> Tensor:
    """x as the product takes it, in the weight's dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: x has dtype {x.dtype}; use a floating-point dtype")
    if dtype is None and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if dtype is not None and x.dtype != dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: x has dtype {x.dtype}, the weight {dtype}; use one dtype, or autocast")
        x = x.to(dtype)
    length = x.shape[-1] if x.dim() else 0
    if length != base.k:
        wide = base.kind == "wide" and length == base.tensors[0].shape[1]
        if not wide:
            raise ValueError(f"{name}: x has shape {list(x.shape)}; the weight needs [..., {base.k}]")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: x is a whole row buffer, which gets no gradient; give x without the tail, or detach it"
            )
        if x.stride(-1) != 1 or not _rows_in_place(x):
            raise ValueError(
                f"{name}: the row buffer has strides {list(x.stride())}; it needs rows one after the other"
            )
    return x


def _rows_in_place(x: Tensor) -> bool:
    return x.reshape(-1, x.shape[-1]).data_ptr() == x.data_ptr()


def check_product(name: str, x: Tensor, base: Base, adapters: Adapters, bias: Tensor | None, dropout: float) -> Tensor:
    """Raise if something does not fit; x in the dtype of the product."""
    given = base.tensors[0]
    x = _input(name, x, base, given.dtype if base.kind in ("wide", "plain") else None)
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout={dropout}; allowed is 0 to below 1")
    if any(t.shape[1] != base.k for t in adapters.a):
        raise ValueError(f"{name}: a has shape {[list(t.shape) for t in adapters.a]}; the weight needs [r, {base.k}]")
    rank = sum(t.shape[0] for t in adapters.a)
    room = given.shape[1] - base.k if base.kind == "wide" else 0
    if base.kind == "wide" and padded(rank) > room:
        raise ValueError(
            f"{name}: the wide weight has room for {room} ranks, the adapters have {rank}; widen it for more"
        )
    others = [*adapters.a, *adapters.b, *base.tensors, *([] if bias is None else [bias])]
    if any(t.device != x.device for t in others):
        raise ValueError(f"{name}: tensors are on {sorted({str(t.device) for t in [x, *others]})}; use one device")
    if bias is not None and bias.shape != (base.n,):
        raise ValueError(f"{name}: bias has shape {list(bias.shape)}; the weight needs [{base.n}]")
    return x


def draw_seed(x: Tensor, dropout: float, count: int = 1) -> Tensor | None:
    """Keys of random numbers from torch's own generator of the device, so that seeding and checkpointing hold."""
    return torch.randint(2**63 - 1, (count,), dtype=torch.int64, device=x.device) if dropout else None
