"""Products with low-rank updates inside, forward and backward, on buffers: no autograd, no checks.

With S the scaled B of all adapters side by side (each in its own rows) and A all of theirs stacked::

    Y = [X | X Aᵀ] [W | S]ᵀ        [dX' | D] = dY [W | S]        dX = dX' + D A        dA = Dᵀ X        dB = dYᵀ (X Aᵀ)

so that an update costs the product R more steps along K, and no pass over Y (LoRA: Hu et al. 2021, arXiv:2106.09685). A
weight that lies alone gets the update added: the same function with one more rounding, and more passes over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ft_kernels import dispatch
from ft_kernels.ops.linear_head.products import mm_into, wide_of
from ft_kernels.ops.lora import scaled
from ft_kernels.ops.lora.operands import Base, Drop, Low, RowNorm, row_buffer
from ft_kernels.ops.lora.reference import keep_mask
from ft_kernels.ops.lora.weight_side import Ready, prepare, uses_kernels

__all__ = [
    "add_input_gradient",
    "backward",
    "fill_tail",
    "forward",
    "gradients",
    "input_gradient",
    "linear",
    "norms_rows",
    "sum_parts",
]


def norms_rows(x: Tensor, low: Low) -> bool:
    """Whether backward can take x itself where the product's input was its norm."""
    # Rows this short are normed in float64.
    return 0 < len(low.a) <= 3 and uses_kernels(x, low.padded) and x.shape[1] > 32


def _dropped(x: Tensor, stream: int, drop: Drop) -> Tensor:
    if not drop.p or drop.seed is None:
        return x
    keep = keep_mask(drop.seed, x.shape[0], x.shape[1], stream, drop.p, drop.first)
    return torch.where(keep, x / (1 - drop.p), 0.0)


def _streams(low: Low, drop: Drop, dtype: torch.dtype) -> list[tuple[int, slice]]:
    """The ranks that see the same dropped input; in fp32 each adapter's, since torch rounds small products less."""
    if not drop.p and dtype.itemsize <= 2:
        return [(0, slice(0, low.padded))]
    ends = [sum(low.ranks[: i + 1]) for i in range(len(low.ranks))]
    return [(i, slice(start, end)) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]


def _blocks(low: Low, dtype: torch.dtype) -> list[tuple[slice, slice]]:
    """The blocks of S that hold numbers; in 16 bits S as it is, for one product in place of several."""
    if dtype.itemsize <= 2:
        return [(slice(None), slice(None))]
    first = [sum(low.ranks[:i]) for i in range(len(low.ranks))]
    return [
        (slice(start, start + n), slice(rank, rank + r))
        for start, n, rank, r in zip(low.starts, low.sizes, first, low.ranks, strict=True)
    ]


def fill_tail(x: Tensor, packed: Tensor, low: Low, row: Tensor | None = None, drop: Drop | None = None) -> Tensor:
    """``X Aᵀ`` as ``[M, R]``, and in ``row`` after the first K columns.

    Args:
        x: ``[M, K]``, the last dimension contiguous: a tensor of its own, or the left part of ``row``.
        row: ``[M, ≥ K + R]``; x is copied to its left part unless it lies there.
    """
    drop = drop or Drop()
    k, r = x.shape[1], low.padded
    if uses_kernels(x, r) and len(low.a) <= 3:
        from ft_kernels.ops.lora import kernels

        return kernels.rows(x, k, packed, low, row, drop)
    tail = dispatch.allocate((x.shape[0], r), x.dtype, x.device)
    tail[:, low.r :] = 0
    for stream, ranks in _streams(low, drop, x.dtype):
        torch.mm(_dropped(x, stream, drop), packed[ranks].t(), out=tail[:, ranks])
    if row is not None:
        if row.data_ptr() != x.data_ptr():
            row[:, :k].copy_(x)
        row[:, k : k + r].copy_(tail)
    return tail


def forward(
    x: Tensor, base: Base, low: Low, bias: Tensor | None = None, drop: Drop | None = None,
    *, residual: Tensor | None = None, over: bool = False, tail: Tensor | None = None, ready: Ready | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y ``[M, N]`` and ``X Aᵀ`` ``[M, R]``, which backward wants.

    Args:
        x: ``[M, K]``, or a whole row buffer ``[M, ≥ K + R]`` with X in its left part, whose tail is filled.
        residual: ``[M, N]``, added to Y, inside the product where that rounds less. over: whether it is memory that Y
            may have.
        tail: ``X Aᵀ`` where it is known, from an earlier forward.
        ready: of this base and these adapters, where it is known. out: ``[M, N]``, where Y goes.
    """
    k, r, m = base.k, low.padded, x.shape[0]
    row = x if x.shape[1] > k else None
    x = x[:, :k]
    if not r or not x.numel():
        y = _dense_product(x, base if ready is None else ready.base, bias, residual, out, over)
        return y, x.new_zeros(m, r)
    ready = ready or prepare(base, low, m, x.dtype)
    widened, columns, packed = ready.widened, ready.columns, ready.packed
    assert columns is not None
    assert packed is not None
    if widened is None:
        if tail is None:
            tail = fill_tail(x, packed, low, None, drop)
        y = _dense_product(x, ready.base, bias, out=out)
        for outputs, ranks in _blocks(low, x.dtype):
            add_product(y[:, outputs], tail[:, ranks], columns[outputs, ranks].t())
        # Added last: a residual is large, and each step would round at its size.
        return y if residual is None else y.add_(residual), tail
    if row is None:
        row = row_buffer(m, k, r, x.dtype, x.device)
        if tail is not None:
            row[:, :k].copy_(x)
    if tail is None:
        tail = fill_tail(x, packed, low, row, drop)
    else:
        row[:, k : k + r].copy_(tail)
    return linear(row[:, : k + r], widened[:, : k + r], bias, residual, out, over), tail


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None = None,
    over: bool = False,
) -> Tensor:  # fmt: skip
    """``X Wᵀ + bias + residual``, into ``out`` if there is one; with a residual alone, in 16 bits, rounded once.

    Args:
        over: whether the sum may be written over the residual, which spares a copy of it.
    """
    if residual is not None and bias is None and x.dtype.itemsize <= 2:
        if over and out is None:
            return residual.addmm_(x, weight.t())
        return torch.addmm(residual, x, weight.t(), out=out)
    if out is None:
        y = F.linear(x, weight, bias)
    else:  # what F.linear calls for rows
        y = torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    return y if residual is None else y.add_(residual)  # see add_product


def _dense_product(
    x: Tensor, base: Base, bias: Tensor | None, residual: Tensor | None = None, out: Tensor | None = None,
    over: bool = False,
) -> Tensor:  # fmt: skip
    if base.kind == "fp8":
        y = scaled.forward(x, base, bias)
        y = y if out is None else out.copy_(y)
        return y if residual is None else y.add_(residual)
    weights = base.dense(x.dtype)
    if len(weights) == 1:
        return linear(x, weights[0], bias, residual, out, over)
    y = dispatch.allocate((x.shape[0], base.n), x.dtype, x.device) if out is None else out
    biases = [None] * len(weights) if bias is None else bias.split([w.shape[0] for w in weights])
    for part, weight, shift in zip(y.split([w.shape[0] for w in weights], 1), weights, biases, strict=True):
        if shift is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(shift, x, weight.t(), out=part)
    return y if residual is None else y.add_(residual)


def backward(
    dy: Tensor, x: Tensor, tail: Tensor, base: Base, low: Low, drop: Drop | None = None,
    *, need_x: bool = True, need_a: bool = True, need_b: bool = True, dense: bool = False, norm: RowNorm | None = None,
    ready: Ready | None = None, out: Tensor | None = None, sums: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dX, the left part of a row buffer, and all adapters' gradients in one flat tensor; None for what is not needed.

    Args:
        dy: ``[M, N]``. x: ``[M, K]``. Both with the last dimension contiguous. tail: ``X Aᵀ`` from forward.
        dense: dX with one row right after the other, which costs nothing where a kernel adds the adapters' share.
        norm: X is the norm of the given one; only where :func:`norms_rows` says so. dX is still that of X.
        ready: as for :func:`forward`. out: ``[M, K]`` without gaps, where dX goes if it is wanted.
        sums: the dtype of the adapters' gradients, for a caller who adds them up; None for the adapters'.
    """
    drop = drop or Drop()
    if not dy.numel() or not base.k:
        flat = low.a[0].new_zeros(low.numel) if low.a and (need_a or need_b) else None
        return (row_buffer(dy.shape[0], base.k, low.r, dy.dtype, dy.device)[:, : base.k] if need_x else None), flat
    dx, dlow, packed = input_gradient(dy, base, low, need_x, need_x or need_a, ready)
    if dx is None:
        out = None
    elif not low.r:
        return (out.copy_(dx) if out is not None else dx.contiguous() if dense else dx), None
    elif out is None and dense:
        out = dispatch.allocate(dx.shape, dx.dtype, dx.device)
    if not low.r:
        return None, None
    flat = gradients(
        dy, x[:, : base.k], tail, dlow, dx, packed, low, drop, need_a=need_a, need_b=need_b, out=out, norm=norm,
        sums=sums,
    )  # fmt: skip
    return dx if out is None else out, flat


def input_gradient(
    dy: Tensor, base: Base, low: Low, need_x: bool = True, need_low: bool = True, ready: Ready | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dY W`` (not yet with the adapters' share), ``D = dY S`` and A stacked; the first two in one row buffer."""
    k, r, m = base.k, low.padded, dy.shape[0]
    if not need_x and not (need_low and r):
        return None, None, None
    out = row_buffer(m, k, r, dy.dtype, dy.device) if need_x else dispatch.allocate((m, k + r), dy.dtype, dy.device)
    dx, dlow = out[:, :k], out[:, k : k + r]
    ready = ready or prepare(base, low, m, dy.dtype, widen=need_x)
    if need_x and ready.widened is not None:
        torch.mm(dy, ready.widened[:, : k + r], out=out[:, : k + r])
        return dx, dlow, ready.packed
    if need_x and not (ready.base.kind == "fp8" and scaled.input_gradient(dy, ready.base, dx)):
        start = 0
        for i, weight in enumerate(ready.base.dense(dy.dtype)):
            part = dy[:, start : start + weight.shape[0]]
            torch.mm(part, weight, out=dx) if i == 0 else add_product(dx, part, weight)
            start += weight.shape[0]
    if not r:
        return dx, None, None
    columns = ready.columns
    assert columns is not None
    dlow[:, low.r :] = 0
    for outputs, ranks in _blocks(low, dy.dtype):
        torch.mm(dy[:, outputs], columns[outputs, ranks], out=dlow[:, ranks])
    return (dx if need_x else None), dlow, ready.packed


def gradients(
    dy: Tensor, x: Tensor, tail: Tensor, dlow: Tensor | None, dx: Tensor | None, packed: Tensor | None, low: Low,
    drop: Drop, *, need_a: bool = True, need_b: bool = True, out: Tensor | None = None,
    norm: RowNorm | None = None, sums: torch.dtype | None = None,
) -> Tensor | None:  # fmt: skip
    """All adapters' gradients in one flat tensor (see :class:`Low`) of their dtype; adds the adapters' share to dx.

    Args:
        out: where dx with that share goes; None is over dx.
        norm, sums: as for :func:`backward`.
    """
    m, k = x.shape
    dtype = sums or low.a[0].dtype
    if not uses_kernels(x, low.padded) or len(low.a) > 3:
        flat = _gradients_by_torch(dy, x, tail, dlow, dx, packed, low, drop, need_a, need_b, sums)
        if out is not None and dx is not None:
            out.copy_(dx)
        return flat
    from ft_kernels.ops.lora import kernels

    parts = kernels.splits(m, k, x.device)
    partial = None
    if need_a or need_b:
        partial = dispatch.allocate((parts, low.numel), torch.float32, x.device)
        if not (need_a and need_b):
            partial.zero_()
    if dlow is not None and packed is not None and (need_a or dx is not None):
        kernels.a_gradient(x, k, dlow, packed, low, partial if need_a else None, dx, parts, drop, out, norm)
    if partial is None:
        return None
    if need_b:
        kernels.b_gradient(dy, tail, low, partial, low.r * k)
    return sum_parts(partial, dtype)


def sum_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts added up in their order."""
    return (partial[0] if partial.shape[0] == 1 else partial.sum(0)).to(dtype)


def _gradients_by_torch(
    dy: Tensor, x: Tensor, tail: Tensor, dlow: Tensor | None, dx: Tensor | None, packed: Tensor | None, low: Low,
    drop: Drop, need_a: bool, need_b: bool, sums: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    k = x.shape[1]
    flat = None
    if need_a or need_b:
        flat = dispatch.allocate((low.numel,), sums or low.a[0].dtype, x.device)
        if not (need_a and need_b):
            flat.zero_()
    for stream, ranks in _streams(low, drop, x.dtype):
        if dlow is None or packed is None:
            break
        mine = dlow[:, ranks]
        if dx is not None:
            add_input_gradient(dx, mine, packed[ranks], stream, drop)
        if need_a and flat is not None:
            end = min(ranks.stop, low.r)
            flat[ranks.start * k : end * k].view(-1, k).copy_(
                _sum_product(mine[:, : end - ranks.start].t(), _dropped(x, stream, drop), sums)
            )
    if need_b and flat is not None:
        rank, slot = 0, low.r * k
        for r, n, start, scaling in zip(low.ranks, low.sizes, low.starts, low.scaling, strict=True):
            product = _sum_product(dy[:, start : start + n].t(), tail[:, rank : rank + r], sums)
            flat[slot : slot + n * r].view(n, r).copy_(product.mul_(scaling))
            rank, slot = rank + r, slot + n * r
    return flat


def _sum_product(left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``left right``; for a sum in a wider dtype not rounded to theirs."""
    if dtype is None or dtype != wide_of(left.dtype):
        return torch.mm(left, right)
    product = dispatch.allocate((left.shape[0], right.shape[1]), dtype, left.device)
    mm_into(product, left, right)
    return product


def add_product(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``target += left right``."""
    if target.dtype.itemsize > 2:
        # addmm_ may add each term to the target by itself, and round at its size.
        return target.add_(torch.mm(left, right))
    return target.addmm_(left, right)


def add_input_gradient(dx: Tensor, dlow: Tensor, packed: Tensor, stream: int, drop: Drop) -> None:
    """``dx += dropout(dlow A)``."""
    if drop.p:
        dx += _dropped(torch.mm(dlow, packed), stream, drop)
    else:
        add_product(dx, dlow, packed)
