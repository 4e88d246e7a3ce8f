"""The attention half of a decoder layer, forward and backward, on buffers.

    N = rms_norm(X)      [Q | K | V] = N W_qkvᵀ + update      Q, K = rope(q_norm(Q)), rope(k_norm(K))
    Y = X + attention(Q, K, V) W_oᵀ + update

The norm writes into the row that the product reads, the rotation writes over Q and K, and X is added by the product.
Backwards the gradients of Q, K and V are turned into one buffer, and that of Y past the block is added by the norm's.
The attention itself is in ``heads``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_kernels import dispatch
from ft_kernels.ops.blocks.heads import Attention, Inputs, Way, attend, inputs, joined, output, sides
from ft_kernels.ops.blocks.parts import (
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
from ft_kernels.ops.lora.operands import Drop, Low
from ft_kernels.ops.lora.weight_side import Ready

__all__ = ["AttentionBlock", "run"]


def _project(
    block: Attention, row: Tensor, low: Low, drop: Drop, tail: Tensor | None, leading: Sequence[int],
    ready: Ready | None,
) -> tuple[Inputs, Tensor]:  # fmt: skip
    qkv, tail = products.forward(row, block.qkv.base, low, block.qkv.bias, drop, tail=tail, ready=ready)
    return inputs(block, qkv, leading), tail


def run(block: Attention, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
    """The block without anything kept."""
    with torch.autocast(x.device.type, enabled=False):
        first, second = (p.low(*ab) for p, ab in sides(block, adapters))
        drop, drop_out = drops(block.dropout, seed)
        rows = as_rows(x)
        row, _ = normed(rows, block.norm, first)
        ready = ready_both(block.qkv, block.o, first, second, rows)
        given, _ = _project(block, row, first, drop, None, x.shape[:-1], ready[0])
        del row
        out = output(block, given)
        del given
        o = as_rows(out.flatten(-2))
        y, _ = products.forward(o, block.o.base, second, block.o.bias, drop_out, residual=rows, ready=ready[1])
        return y.view(x.shape)


class AttentionBlock(torch.autograd.Function):
    """:func:`run` with a backward."""

    @staticmethod
    def forward(ctx: Any, block: Attention, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            first, second = (p.low(*ab) for p, ab in sides(block, adapters))
            drop, drop_out = drops(block.dropout, seed)
            rows, keep = as_rows(x), block.keep
            row: Tensor | None
            row, rstd, residual, over = normed_copied(rows, block.norm, first, block.o)
            ready = ready_both(block.qkv, block.o, first, second, rows)
            given, tail = _project(block, row, first, drop, None, x.shape[:-1], ready[0])
            if keep != "all" or not first.r:
                row = None
            q, k, q_rstd, k_rstd = given.q, given.k, given.q_rstd, given.k_rstd
            qkv: Tensor | None = given.qkv
            graph: Way | None = None
            kept: list[Tensor] = []
            if keep == "none":
                out = output(block, given)
            else:
                out, graph, kept = attend(block, given)
            del given
            o = as_rows(out.flatten(-2))
            y, tail_out = products.forward(
                o, block.o.base, second, block.o.bias, drop_out, residual=residual, over=over, ready=ready[1]
            )
        ctx.set_materialize_grads(False)
        ctx.block, ctx.graph, ctx.kept = block, graph, len(kept)
        whole = keep == "all"
        ctx.save_for_backward(
            x, seed, tail, tail_out, row,
            rstd if keep in ("all", "most") else None,
            qkv if keep in ("all", "most") else None,
            q if whole and q_rstd is not None else None, k if whole and k_rstd is not None else None,
            q_rstd if whole else None, k_rstd if whole else None,
            out if graph is not None and (second.r or graph.reads_output) else None,
            *kept, *adapters,
        )  # fmt: skip
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        if dy is None:
            return (None,) * count
        block: Attention = ctx.block
        if block.keep != "none":
            refuse_twice(ctx, "attention_block")
        x, seed, tail, tail_out, row, rstd, qkv, q, k, q_rstd, k_rstd, out, *others = ctx.saved_tensors
        kept, adapters = others[: ctx.kept], others[ctx.kept :]
        needs = split_adapters((block.qkv, block.o), ctx.needs_input_grad[3:])
        need_x = ctx.needs_input_grad[1]
        with torch.autocast(x.device.type, enabled=False):
            pairs = sides(block, adapters)
            first, second = (p.low(*ab) for p, ab in pairs)
            drop, drop_out = drops(block.dropout, seed)
            rows, leading, dys, graph = as_rows(x), x.shape[:-1], as_rows(dy), ctx.graph
            need_first = [any(n) for n in needs[0]]
            ready = ready_both(block.qkv, block.o, first, second, rows)
            given = None
            if qkv is not None and q is None and k is None:
                given = inputs(block, qkv, leading, turned=True)
            elif qkv is not None:
                views = block.parts(qkv, leading)
                given = Inputs(qkv, views[0] if q is None else q, views[1] if k is None else k, views[2],
                                q_rstd, k_rstd)  # fmt: skip
            elif need_x or any(need_first) or block.keep == "none":
                row, rstd = normed(rows, block.norm, first)
                given, _ = _project(block, row, first, drop, tail, leading, ready[0])
                if not first.r:
                    row = None
            if block.keep == "none":
                assert given is not None
                out, graph, kept = attend(block, given)
            o = dys if out is None else as_rows(out.flatten(-2))
            dout, flat_out = products.backward(
                dys, o, tail_out, block.o.base, second, drop_out,
                need_x=need_x or any(need_first), need_a=any(needs[1][0]), need_b=any(needs[1][1]), dense=True,
                ready=ready[1],
            )  # fmt: skip
            dx = flat = None
            if dout is not None:
                assert given is not None
                heads = (*leading, block.heads, block.head_dim)
                grads = graph.backward(dout.view(heads), given, out, kept)
                del dout, out, kept
                rstds = (given.q_rstd, given.k_rstd)
                joint = dispatch.allocate(given.qkv.shape, x.dtype, x.device)
                joined(block, grads, given.qkv, rstds, block.tables, joint, leading)
                del given, grads
                # Gradients of A need the normed rows, which a kernel makes as it reads x.
                if row is None and need_first[0] and not products.norms_rows(rows, first):
                    row, rstd = normed(rows, block.norm, first)
                dn, flat = products.backward(
                    joint, rows if row is None else row, tail, block.qkv.base, first, drop,
                    need_x=need_x, need_a=need_first[0], need_b=need_first[1],
                    norm=row_norm(block.norm, rstd) if row is None and need_first[0] else None, ready=ready[0],
                )  # fmt: skip
                if dn is not None:
                    dx = normed_backward(dn, rows, block.norm, rstd, dys).view(x.shape)
        result: list[Tensor | None] = []
        for side, need, part in zip(pairs, needs, (flat, flat_out), strict=True):
            a, b = side[1]
            da, db = unflatten(part, a, b, *need) if part is not None else ([None] * len(a), [None] * len(b))
            result += [*da, *db]
        return None, dx, None, *result
