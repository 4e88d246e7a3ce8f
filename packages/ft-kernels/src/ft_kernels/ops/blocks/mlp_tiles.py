"""The perceptron half of a decoder layer, some rows at a time: what ``mlp`` computes, in less memory.

[G | U] is never whole: forward makes it for a tile, whose part of Y it becomes, and backward makes it again, tile by
tile. Whatever the number of rows, this takes the memory of one tile beside X, Y and their gradients. Weights that have
to be expanded are expanded once for all tiles of a pass, and are there for as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_kernels import dispatch
from ft_kernels.ops.blocks.mlp import MLP, sides
from ft_kernels.ops.blocks.parts import drops, normed, normed_backward, row_norm, split_adapters
from ft_kernels.ops.blocks.tiles import Total, even, prepared, tiles
from ft_kernels.ops.lora import products
from ft_kernels.ops.lora.autograd import as_rows, unflatten
from ft_kernels.ops.lora_mlp import products as mlp_products

__all__ = ["TiledMLPBlock", "run"]


class _Pass:
    """One way through the block, forward or backward.

    Attributes:
        rows: X as ``[M, H]``.
        first, second: the adapters of both products. ready: what stands on their weights' side.
    """

    def __init__(self, block: MLP, x: Tensor, seed: Tensor | None, adapters: Sequence[Any]) -> None:
        self.block, self.rows = block, as_rows(x)
        self.first, self.second = (product.low(*ab) for product, ab in sides(block, adapters))
        self.drop, self.drop_hidden = drops(block.dropout, seed)
        m, most = len(self.rows), block.tile or len(self.rows)
        self.tiles, each = tiles(m, most), even(m, most)
        pairs = ((block.gate_up, self.first), (block.down, self.second))
        one, two = (prepared(product, low, each, x.dtype) for product, low in pairs)
        self.ready = one, two

    def product(self, part: slice, row: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[G | U] of a tile's normed rows, and what the adapters made of these."""
        own = self.block.gate_up
        return products.forward(
            row, own.base, self.first, own.bias, self.drop.at(part.start), tail=tail, ready=self.ready[0]
        )  # fmt: skip

    def second_product(self, part: slice, both: Tensor, out: Tensor | None = None) -> Tensor:
        """Y of a tile into ``out``, if there is one; and what down's adapter made of the product of a(G) and U."""
        own = self.block.down
        return mlp_products.second_product(
            both, self.first, own.base, self.second, self.block.kind, self.drop_hidden.at(part.start), bias=own.bias,
            residual=self.rows[part], answer=out is not None, ready=self.ready[1], out=out,
        )[1]  # fmt: skip

    def forward(self, part: slice, y: Tensor, tail: Tensor, hidden_tail: Tensor) -> None:
        row, _ = normed(self.rows[part], self.block.norm, self.first)
        both, tail[part] = self.product(part, row)
        del row  # its memory is there for what comes
        hidden_tail[part] = self.second_product(part, both, y[part])

    def backward(
        self, part: slice, dy: Tensor, tails: tuple[Tensor, Tensor] | None, dx: Tensor | None, sums: torch.dtype
    ) -> Tensor:
        """The adapters' gradients of a tile, all in one; and that of X into its part of dx."""
        block, first = self.block, self.first
        rows = self.rows[part]
        row: Tensor | None
        row, rstd = normed(rows, block.norm, first)
        both, tail = self.product(part, row, None if tails is None else tails[0][part])
        # Gradients of A need the normed rows, which a kernel makes as it reads x.
        if products.norms_rows(rows, first) or not first.r:
            row = None
        hidden_tail = self.second_product(part, both) if tails is None else tails[1][part]
        dn, flat = mlp_products.backward(
            dy[part], rows if row is None else row, both, tail, hidden_tail, block.gate_up.base, first,
            block.down.base, self.second, block.kind, self.drop.at(part.start), self.drop_hidden.at(part.start),
            need_x=dx is not None, norm=row_norm(block.norm, rstd) if row is None and first.r else None,
            ready=self.ready, sums=sums,
        )  # fmt: skip
        if dx is not None and dn is not None:
            normed_backward(dn, rows, block.norm, rstd, dy[part], dx[part])
        return flat


def _forward(
    block: MLP, x: Tensor, seed: Tensor | None, adapters: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Y, and both products' low-rank inputs."""
    if not block.answer:
        # Backward makes [G | U] again anyway, and these with it.
        return dispatch.allocate((1,) * x.dim(), x.dtype, x.device).expand(x.shape), None
    way = _Pass(block, x, seed, adapters)
    y = dispatch.allocate(way.rows.shape, x.dtype, x.device)
    tail, hidden_tail = (
        dispatch.allocate((len(way.rows), low.padded), x.dtype, x.device) for low in (way.first, way.second)
    )
    for part in way.tiles:
        way.forward(part, y, tail, hidden_tail)
    return y.view(x.shape), (tail, hidden_tail)


def run(block: MLP, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
    """The block without anything kept."""
    with torch.autocast(x.device.type, enabled=False):
        return _forward(block, x, seed, adapters)[0]


class TiledMLPBlock(torch.autograd.Function):
    """:func:`run` with a backward."""

    @staticmethod
    def forward(ctx: Any, block: MLP, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, tails = _forward(block, x, seed, adapters)
        ctx.set_materialize_grads(False)
        ctx.block = block
        ctx.save_for_backward(x, seed, *(tails or (None, None)), *adapters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        block: MLP = ctx.block
        x, seed, tail, hidden_tail, *adapters = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            way, dys = _Pass(block, x, seed, adapters), as_rows(dy)
            dx = dispatch.allocate(way.rows.shape, x.dtype, x.device) if ctx.needs_input_grad[1] else None
            total = Total(adapters[0].dtype if adapters else x.dtype)
            for part in way.tiles:
                tails = None if tail is None else (tail, hidden_tail)
                total.add(way.backward(part, dys, tails, dx, total.wide))
            flat = total.result()
        assert flat is not None
        needs = split_adapters((block.gate_up, block.down), ctx.needs_input_grad[3:])
        result: list[Tensor | None] = []
        parts = flat.split([way.first.numel, way.second.numel])
        for (_, ab), need, part in zip(sides(block, adapters), needs, parts, strict=True):
            da, db = unflatten(part, *ab, *need)
            result += [*da, *db]
        return None, None if dx is None else dx.view(x.shape), None, *result
