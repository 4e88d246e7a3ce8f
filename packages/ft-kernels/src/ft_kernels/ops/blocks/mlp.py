"""The gated multilayer perceptron half of a decoder layer, forward and backward, on buffers.

    N = rms_norm(X)      [G | U] = N W_gate_upᵀ + update      Y = X + (a(G)·U) W_downᵀ + update

The norm writes into the row that the product reads, and X is added by the last product. Backwards the gradient of Y
past the block is added by the norm's. a(G)·U is never kept: the pass that makes the gradients of G and U makes it once
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_kernels.ops.blocks.parts import (
    Norm,
    Product,
    drops,
    normed,
    normed_backward,
    normed_copied,
    ready_both,
    refuse_twice,
    row_norm,
    split_adapters,
)
from ft_kernels.ops.lora import products
from ft_kernels.ops.lora.autograd import as_rows, unflatten
from ft_kernels.ops.lora_mlp import products as mlp_products

__all__ = ["MLP", "MLPBlock", "run", "sides"]


@dataclass(frozen=True, eq=False)
class MLP:
    """What does not change from call to call, or is no activation.

    Attributes:
        kind: the activation's number.
        answer: whether Y is wanted, or what is kept for backward alone.
        tile: rows at a time (see ``mlp_tiles``); None for all.
    """

    norm: Norm
    gate_up: Product
    down: Product
    kind: int
    dropout: float
    keep: str
    answer: bool = True
    tile: int | None = None


def _forward(
    block: MLP, x: Tensor, seed: Tensor | None, adapters: Sequence[Tensor], copies: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Y, and all there may be to keep: the normed row, 1/rms, [G | U] and both products' low-rank inputs.

    Args:
        copies: whether the residual may lie twice in memory from the norm on, which spares a pass over it.
    """
    first, second = (p.low(*ab) for p, ab in sides(block, adapters))
    drop, drop_hidden = drops(block.dropout, seed)
    rows = as_rows(x)
    row: Tensor | None
    if block.answer and copies:
        row, rstd, residual, over = normed_copied(rows, block.norm, first, block.down)
    else:
        (row, rstd), residual, over = normed(rows, block.norm, first), rows, False
    ready = ready_both(block.gate_up, block.down, first, second, rows)
    both, tail = products.forward(row, block.gate_up.base, first, block.gate_up.bias, drop, ready=ready[0])
    if block.keep != "all" or not block.gate_up.starts:
        row = None  # its memory is there for what comes
    y, hidden_tail = mlp_products.second_product(
        both, first, block.down.base, second, block.kind, drop_hidden, bias=block.down.bias, residual=residual,
        over=over, answer=block.answer, ready=ready[1],
    )  # fmt: skip
    return y.view(x.shape), (row, rstd, both, tail, hidden_tail)


def sides(block: MLP, adapters: Sequence[Any]) -> list[tuple[Product, tuple[Any, Any]]]:
    """Both products, each with its adapters' a and b."""
    two = (block.gate_up, block.down)
    return list(zip(two, split_adapters(two, adapters), strict=True))


def run(block: MLP, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
    """The block without anything kept."""
    with torch.autocast(x.device.type, enabled=False):
        return _forward(block, x, seed, adapters, copies=False)[0]


class MLPBlock(torch.autograd.Function):
    """:func:`run` with a backward."""

    @staticmethod
    def forward(ctx: Any, block: MLP, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, (row, rstd, both, tail, hidden_tail) = _forward(block, x, seed, adapters, copies=True)
        ctx.set_materialize_grads(False)
        ctx.block = block
        activations = block.keep in ("all", "most")
        ctx.save_for_backward(
            x, seed, tail, hidden_tail,
            row, rstd if activations else None, both if activations else None,
            *adapters,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        block: MLP = ctx.block
        if block.keep in ("all", "most"):
            refuse_twice(ctx, "mlp_block")
        x, seed, tail, hidden_tail, row, rstd, both, *adapters = ctx.saved_tensors
        need_x = ctx.needs_input_grad[1]
        with torch.autocast(x.device.type, enabled=False):
            pairs = sides(block, adapters)
            first, second = (p.low(*ab) for p, ab in pairs)
            drop, drop_hidden = drops(block.dropout, seed)
            rows, dys = as_rows(x), as_rows(dy)
            ready = ready_both(block.gate_up, block.down, first, second, rows)
            # Gradients of A need the normed rows, which a kernel makes as it reads x.
            alone = products.norms_rows(rows, first)
            if row is None and (both is None or (first.r and not alone)):
                row, rstd = normed(rows, block.norm, first)
            if both is None:
                both, _ = products.forward(
                    row, block.gate_up.base, first, block.gate_up.bias, drop, tail=tail, ready=ready[0]
                )
                if alone or not first.r:
                    row = None
            dn, flat = mlp_products.backward(
                dys, rows if row is None else row, both, tail, hidden_tail, block.gate_up.base, first,
                block.down.base, second, block.kind, drop, drop_hidden, need_x=need_x, ready=ready,
                norm=row_norm(block.norm, rstd) if row is None and first.r else None,
            )  # fmt: skip
            dx = normed_backward(dn, rows, block.norm, rstd, dys).view(x.shape) if dn is not None else None
        needs = split_adapters((block.gate_up, block.down), ctx.needs_input_grad[3:])
        result: list[Tensor | None] = []
        parts = flat.split([first.numel, second.numel])
        for side, need, part in zip(pairs, needs, parts, strict=True):
            da, db = unflatten(part, *side[1], *need)
            result += [*da, *db]
        return None, dx, None, *result
