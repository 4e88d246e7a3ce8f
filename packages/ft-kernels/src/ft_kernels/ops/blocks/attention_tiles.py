"""The attention half of a decoder layer, some rows at a time: what ``attention`` computes, in less memory.

Whole are what the attention itself reads and writes: q, k and v, its output, and their gradients. The normed rows, the
input of the last product, and the gradients of the first product and of its input are there for a tile. Weights that
have to be expanded are expanded once for all tiles of a product, which comes and goes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_kernels import dispatch
from ft_kernels.ops.blocks.heads import Attention, Way, attend, batched, inputs, joined, output, sides
from ft_kernels.ops.blocks.parts import drops, normed, normed_backward, refuse_twice, row_norm, split_adapters
from ft_kernels.ops.blocks.tiles import Piece, Total, pieces, prepared
from ft_kernels.ops.lora import products
from ft_kernels.ops.lora.autograd import as_rows, unflatten

__all__ = ["TiledAttentionBlock", "run"]


class _Pass:
    """One way through the block, forward or backward.

    Attributes:
        rows: X as ``[M, H]``.
        first, second: the adapters of both products.
    """

    def __init__(self, block: Attention, x: Tensor, seed: Tensor | None, adapters: Sequence[Any]) -> None:
        self.block, self.rows = block, as_rows(x)
        self.first, self.second = (product.low(*ab) for product, ab in sides(block, adapters))
        self.drop, self.drop_out = drops(block.dropout, seed)
        self.batches, self.length = (1, *x.shape[:-1])[-2:]
        self.pieces = pieces(self.batches, self.length, block.tile or len(self.rows))
        self.most = max(piece.rows.stop - piece.rows.start for piece in self.pieces)

    def project(self, tail: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the first product makes, what its adapters made of the normed rows (known or not), and their 1/rms."""
        own, m, x = self.block.qkv, len(self.rows), self.rows
        ready = prepared(own, self.first, self.most, x.dtype)
        qkv = dispatch.allocate((m, own.base.n), x.dtype, x.device)
        made = dispatch.allocate((m, self.first.padded), x.dtype, x.device) if tail is None else tail
        rstds = []
        for part in (piece.rows for piece in self.pieces):
            row, rstd = normed(x[part], self.block.norm, self.first)
            low = products.forward(
                row, own.base, self.first, own.bias, self.drop.at(part.start), ready=ready, out=qkv[part],
                tail=None if tail is None else tail[part],
            )[1]  # fmt: skip
            if tail is None:
                made[part] = low
            rstds.append(rstd)
            del row  # not there beside the next one
        return qkv, made, torch.cat(rstds)

    def answer(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Y ``[M, H]`` of the attention's output, and what the adapter made of that."""
        own, x = self.block.o, self.rows
        ready = prepared(own, self.second, self.most, x.dtype)
        y = dispatch.allocate(x.shape, x.dtype, x.device)
        tail = dispatch.allocate((len(x), self.second.padded), x.dtype, x.device)
        for piece in self.pieces:
            part = piece.rows
            _, tail[part] = products.forward(
                self.flat(out, piece), own.base, self.second, own.bias, self.drop_out.at(part.start),
                residual=x[part], ready=ready, out=y[part],
            )  # fmt: skip
        return y, tail

    def flat(self, out: Tensor, piece: Piece) -> Tensor:
        """A piece of ``[..., S, heads, D]`` as rows."""
        return as_rows(piece.of(batched(out)).flatten(-2))

    def tables(self, piece: Piece) -> tuple[Tensor, Tensor] | None:
        """cos and sin of a piece's tokens."""
        if self.block.tables is None:
            return None
        cos, sin = self.block.tables  # [1, B, S, pairs]
        return piece.of(cos[0])[None], piece.of(sin[0])[None]

    def answer_backward(
        self, dy: Tensor, out: Tensor | None, tail: Tensor, need_out: bool, needs: Sequence[Sequence[bool]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the attention's output ``[M, N]``, and the last adapter's in one."""
        own, x, total = self.block.o, self.rows, Total(self.second.a[0].dtype if self.second.r else self.rows.dtype)
        ready = prepared(own, self.second, self.most, x.dtype)
        dout = dispatch.allocate((len(x), own.base.k), x.dtype, x.device) if need_out else None
        for piece in self.pieces:
            part = piece.rows
            given = dy[part] if out is None else self.flat(out, piece)
            _, flat = products.backward(
                dy[part], given, tail[part], own.base, self.second, self.drop_out.at(part.start),
                need_x=need_out, need_a=any(needs[0]), need_b=any(needs[1]), ready=ready,
                out=None if dout is None else dout[part], sums=total.wide,
            )  # fmt: skip
            total.add(flat)
        return dout, total.result()

    def project_backward(
        self, grads: Sequence[Tensor | None], qkv: Tensor | None, rstds: Sequence[Tensor | None], tail: Tensor,
        rstd: Tensor | None, dy: Tensor, need_x: bool, needs: Sequence[Sequence[bool]],
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """The gradient of X ``[M, H]``, and the first adapters' in one.

        Args:
            grads: of q, k and v as the attention got them.
            qkv: what the product made; only where q or k is normed. rstds: of these. rstd: of X, if it is known.
        """
        block, x, first = self.block, self.rows, self.first
        total = Total(first.a[0].dtype if first.r else x.dtype)
        need_a, need_b = (any(n) for n in needs)
        ready = prepared(block.qkv, first, self.most, x.dtype)
        dx = dispatch.allocate(x.shape, x.dtype, x.device) if need_x else None
        by_kernel = products.norms_rows(x, first)  # which makes the normed rows as it reads x
        for piece in self.pieces:
            part = piece.rows
            rows = x[part]
            leading = (piece.batch.stop - piece.batch.start, piece.tokens.stop - piece.tokens.start)
            joint = dispatch.allocate((len(rows), block.qkv.base.n), x.dtype, x.device)
            joined(
                block, [None if d is None else piece.of(batched(d)) for d in grads],
                None if qkv is None else qkv[part],
                [None if r is None else piece.of(r.view(self.batches, self.length, -1)) for r in rstds],
                self.tables(piece), joint, leading,
            )  # fmt: skip
            row, own = None, None if rstd is None else rstd[part]
            if own is None or (need_a and not by_kernel):
                row, own = normed(rows, block.norm, first)
            if by_kernel or not need_a:
                row = None
            dn, flat = products.backward(
                joint, rows if row is None else row, tail[part], block.qkv.base, first, self.drop.at(part.start),
                need_x=need_x, need_a=need_a, need_b=need_b, ready=ready, sums=total.wide,
                norm=row_norm(block.norm, own) if row is None and need_a else None,
            )  # fmt: skip
            total.add(flat)
            if dx is not None and dn is not None:
                normed_backward(dn, rows, block.norm, own, dy[part], dx[part])
            del joint, row, dn  # not there beside the next ones
        return dx, total.result()


def run(block: Attention, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
    """The block without anything kept."""
    with torch.autocast(x.device.type, enabled=False):
        way = _Pass(block, x, seed, adapters)
        out = output(block, inputs(block, way.project()[0], x.shape[:-1]))
        return way.answer(out)[0].view(x.shape)


class TiledAttentionBlock(torch.autograd.Function):
    """:func:`run` with a backward."""

    @staticmethod
    def forward(ctx: Any, block: Attention, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            way, keep = _Pass(block, x, seed, adapters), block.keep
            qkv: Tensor | None
            qkv, tail, rstd = way.project()
            given = inputs(block, qkv, x.shape[:-1])
            graph: Way | None = None
            kept: list[Tensor] = []
            if keep == "none":
                out = output(block, given)
            else:
                out, graph, kept = attend(block, given)
            most = keep in ("all", "most")
            if not most:
                qkv = None
            del given
            y, tail_out = way.answer(out)
        ctx.set_materialize_grads(False)
        ctx.block, ctx.graph, ctx.kept = block, graph, len(kept)
        ctx.save_for_backward(
            x, seed, tail, tail_out, rstd if most else None, qkv,
            out if graph is not None and (way.second.r or graph.reads_output) else None,
            *kept, *adapters,
        )  # fmt: skip
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        block: Attention = ctx.block
        if block.keep != "none":
            refuse_twice(ctx, "attention_block")
        x, seed, tail, tail_out, rstd, qkv, out, *others = ctx.saved_tensors
        kept, adapters = others[: ctx.kept], others[ctx.kept :]
        needs = split_adapters((block.qkv, block.o), ctx.needs_input_grad[3:])
        need_x = ctx.needs_input_grad[1]
        further = need_x or any(any(n) for n in needs[0])
        dx = flat = given = None
        with torch.autocast(x.device.type, enabled=False):
            way, dys, graph = _Pass(block, x, seed, adapters), as_rows(dy), ctx.graph
            if qkv is not None:
                given = inputs(block, qkv, x.shape[:-1], turned=True)
            elif further or block.keep == "none":
                qkv, _, rstd = way.project(tail)
                given = inputs(block, qkv, x.shape[:-1])
            if block.keep == "none":
                assert given is not None
                out, graph, kept = attend(block, given)
            dout, flat_out = way.answer_backward(dys, out, tail_out, further, needs[1])
            if dout is not None:
                assert given is not None
                grads = graph.backward(dout.view(given.q.shape), given, out, kept)
                rstds = (given.q_rstd, given.k_rstd)
                if block.q_norm is None and block.k_norm is None:
                    qkv = None
                del dout, out, kept, others, given  # before there are gradients of X
                dx, flat = way.project_backward(grads, qkv, rstds, tail, rstd, dys, need_x, needs[0])
        result: list[Tensor | None] = []
        for (_, (a, b)), need, part in zip(sides(block, adapters), needs, (flat, flat_out), strict=True):
            da, db = unflatten(part, a, b, *need) if part is not None else ([None] * len(a), [None] * len(b))
            result += [*da, *db]
        return None, None if dx is None else dx.view(x.shape), None, *result
