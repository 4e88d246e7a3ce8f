"""A gated multilayer perceptron with low-rank updates, forward and backward, on buffers: no autograd, no checks.

    [G | U] = X [W_gate; W_up]ᵀ + update        H = a(G)·U        Y = H W_downᵀ + update

GLU Variants Improve Transformer (Shazeer 2020, arXiv:2002.05202). Kept for backward are X, [G | U] and what the
adapters made of X and H, a few numbers a row; H is computed again, and the gradients of G and U are written over them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ft_kernels import dispatch, tuning
from ft_kernels.ops.glu import reference as glu
from ft_kernels.ops.lora import products, weight_side
from ft_kernels.ops.lora.operands import Base, Drop, Low, RowNorm, row_buffer
from ft_kernels.ops.lora.weight_side import Ready

__all__ = ["backward", "forward", "second_product"]

MOST_RANKS = 64
"""More ranks of one adapter than this do not fit beside the activation."""


def _fuses(gate_up: Tensor, first: Low, second: Low) -> bool:
    ranks = [*first.ranks, second.padded]
    return (
        weight_side.uses_kernels(gate_up, max(first.padded, second.padded))
        and max(ranks) <= MOST_RANKS
        and second.r > 0
        and len(first.a) <= 2
        and tuning.family(gate_up.device) != "turing"
    )


def _activate(gate_up: Tensor, kind: int, out: Tensor) -> Tensor:
    """H into ``out``."""
    if dispatch.use_triton(gate_up):
        from ft_kernels.ops.glu import kernels

        return kernels.forward(gate_up, None, kind, out)
    return out.copy_(glu.glu(gate_up, None, kind))


def _deactivate(dh: Tensor, gate_up: Tensor, kind: int) -> None:
    """The gradients of G and U over them."""
    gate, up = glu.halves(gate_up, None)
    if dispatch.use_triton(gate_up):
        from ft_kernels.ops.glu import kernels

        kernels.backward(dh, gate, up, kind, dgate=gate, dup=up)
        return
    # An operation's own computation is not recorded, so the derivative is spelt out.
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, d = gate.to(wide), dh.to(wide)
    if kind == 0:
        active, dgate = F.silu(x), torch.ops.aten.silu_backward(d * up.to(wide), x)
    else:
        approximate = "tanh" if kind == 2 else "none"
        active = F.gelu(x, approximate=approximate)
        dgate = torch.ops.aten.gelu_backward(d * up.to(wide), x, approximate=approximate)
    gate.copy_(dgate)
    up.copy_(d * active)


def forward(
    x: Tensor, gate_up: Base, first: Low, down: Base, second: Low, kind: int,
    drop: Drop | None = None, drop_hidden: Drop | None = None,
    *, bias: tuple[Tensor | None, Tensor | None] = (None, None), residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Y, ``[G | U]``, and what the first and the second product's adapters made of their inputs.

    Args:
        x: ``[M, K]``, or a whole row buffer (see :func:`ft_kernels.ops.lora.products.forward`).
        first: the adapters of gate (from output 0 on) and up (from output I on), or one of both.
        kind: the activation's number in ``glu.reference.KINDS``.
        bias: of gate and up together, and of down. residual: ``[M, N]``, added to Y.
    """
    both, tail = products.forward(x, gate_up, first, bias[0], drop)
    y, hidden_tail = second_product(both, first, down, second, kind, drop_hidden, bias=bias[1], residual=residual)
    return y, both, tail, hidden_tail


def second_product(
    both: Tensor, first: Low, down: Base, second: Low, kind: int, drop_hidden: Drop | None = None,
    *, bias: Tensor | None = None, residual: Tensor | None = None, over: bool = False, answer: bool = True,
    ready: Ready | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Y of ``[G | U]``, and what the second product's adapters made of H.

    Args:
        first: the adapters that ``[G | U]`` has in it.
        answer: whether Y is wanted; without it the product is left out, and a tensor of Y's shape is given whose
            numbers mean nothing and take no memory.
        over, ready, out: as for :func:`ft_kernels.ops.lora.products.forward`, of the second product.
    """
    drop_hidden = drop_hidden or Drop()
    m, i, r, dtype, device = both.shape[0], down.k, second.padded, both.dtype, both.device
    if not answer and not r:
        return _nothing(both, down.n), both.new_empty(m, 0)
    # Without an answer a quantized weight need not be expanded.
    without = not answer and ready is None and down.kind in ("nf4", "int8") and m >= weight_side.SMALL
    ready = ready or weight_side.prepare(down, second, m, dtype, widen=not without)
    packed, widened = ready.packed, ready.widened
    row = row_buffer(m, i, r, dtype, device)
    if packed is not None and (without or widened is not None) and _fuses(both, first, second):
        from ft_kernels.ops.lora_mlp import kernels

        hidden_tail = kernels.hidden(both, row, packed, kind, drop_hidden)
        if widened is None or not answer:
            return _nothing(both, down.n), hidden_tail
        return products.linear(row[:, : i + r], widened[:, : i + r], bias, residual, out, over), hidden_tail
    h = _activate(both, kind, row[:, :i])
    if packed is not None and not answer:
        return _nothing(both, down.n), products.fill_tail(h, packed, second, None, drop_hidden)
    return products.forward(
        row if r else h, down, second, bias, drop_hidden, residual=residual, over=over, ready=ready, out=out
    )


def _nothing(like: Tensor, n: int) -> Tensor:
    """A tensor for an answer that nobody reads."""
    return dispatch.allocate((1, 1), like.dtype, like.device).expand(like.shape[0], n)


def backward(
    dy: Tensor, x: Tensor, both: Tensor, tail: Tensor, hidden_tail: Tensor, gate_up: Base, first: Low, down: Base,
    second: Low, kind: int, drop: Drop | None = None, drop_hidden: Drop | None = None,
    *, need_x: bool = True, norm: RowNorm | None = None, ready: tuple[Ready | None, Ready | None] = (None, None),
    sums: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """dX, the left part of a row buffer, and all adapters' gradients in one flat tensor, the first product's first.

    Args:
        both: ``[G | U]``, which their gradients are written over.
        norm, sums: as for :func:`ft_kernels.ops.lora.products.backward`. ready: the same, of both products.
    """
    drop, drop_hidden = drop or Drop(), drop_hidden or Drop()
    m, k, i = x.shape[0], gate_up.k, down.k
    x = x[:, :k]
    some = [*first.a, *second.a, x][0]
    if not m:
        flat = some.new_zeros(first.numel + second.numel)
        return (row_buffer(0, k, first.r, x.dtype, x.device)[:, :k] if need_x else None), flat
    dh, dlow, packed = products.input_gradient(dy, down, second, ready=ready[1])
    assert dh is not None
    if _fuses(both, first, second) and dlow is not None and packed is not None:
        from ft_kernels.ops.lora import kernels as lora_kernels
        from ft_kernels.ops.lora_mlp import kernels

        parts = kernels.middle_parts(m, i, lora_kernels.splits(m, k, x.device), x.device)
        partial = dispatch.allocate((parts, first.numel + second.numel), torch.float32, x.device)
        lora_kernels.b_gradient(dy, hidden_tail, second, partial, first.numel + second.r * i)
        gate, up = _places(first, k, i)
        kernels.middle(
            both, dh, dlow, packed, second.r, tail, partial, first.numel, gate, up, kind, drop_hidden
        )  # fmt: skip
        del dh, dlow  # half as large as both, whose product with the weight comes next
        dx, dfirst, stacked = products.input_gradient(both, gate_up, first, need_x, ready=ready[0])
        if dfirst is not None and stacked is not None:
            lora_kernels.a_gradient(x, k, dfirst, stacked, first, partial, dx, parts, drop, None, norm)
        return dx, products.sum_parts(partial, sums or second.a[0].dtype)
    h = _activate(both, kind, dispatch.allocate((m, i), x.dtype, x.device))
    flats: list[Tensor | None] = []
    if second.r:
        flats.append(products.gradients(dy, h, hidden_tail, dlow, dh, packed, second, drop_hidden, sums=sums))
    _deactivate(dh, both, kind)
    del h, dh, dlow
    dx, own = products.backward(
        both, x, tail, gate_up, first, drop, need_x=need_x, norm=norm, ready=ready[0], sums=sums
    )  # fmt: skip
    given = [flat for flat in (own, *flats) if flat is not None]
    return dx, torch.cat(given) if given else some.new_empty(0)


_Place = tuple[int, int, int, float]


def _places(low: Low, k: int, i: int) -> tuple[_Place | None, _Place | None]:
    """For gate and for up: where dB goes in the flat gradients, the adapter's first rank, its ranks, its scaling."""
    gate: _Place | None = None
    up: _Place | None = None
    slot, rank = low.r * k, 0
    for r, n, start, scaling in zip(low.ranks, low.sizes, low.starts, low.scaling, strict=True):
        if start < i:
            gate = (slot, rank, r, scaling)
        if start + n > i:
            up = (slot + max(i - start, 0) * r, rank, r, scaling)
        slot, rank = slot + n * r, rank + r
    return gate, up
