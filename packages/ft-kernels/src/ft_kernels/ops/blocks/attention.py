"""The attention half of a decoder layer, forward and backward, on buffers.

    N = rms_norm(X)      [Q | K | V] = N W_qkvᵀ + update      Q, K = rope(q_norm(Q)), rope(k_norm(K))
    Y = X + attention(Q, K, V) W_oᵀ + update

The norm writes into the row that the product reads, the rotation writes over Q and K, and X is added by the product.
Backwards the gradients of Q, K and V are turned into one buffer, and that of Y past the block is added by the norm's.
The attention itself is a function of the caller's, whose graph is recorded without its memory (see ``recorded``), or
kernels that are launched without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ft_kernels import dispatch
from ft_kernels.ops.blocks.parts import (
    Norm,
    Product,
    drops,
    normed,
    normed_backward,
    refuse_twice,
    row_norm,
    split_adapters,
)
from ft_kernels.ops.blocks.recorded import Recorded, record
from ft_kernels.ops.lora import products
from ft_kernels.ops.lora.autograd import as_rows, unflatten
from ft_kernels.ops.lora.operands import Drop, Low
from ft_kernels.ops.packed_attention.direct import Direct

__all__ = ["Attention", "AttentionBlock", "run"]


@dataclass(frozen=True, eq=False)
class Attention:
    """What does not change from call to call, or is no activation.

    Attributes:
        tables: cos and sin as the rotation's kernel takes them, or None for no rotation.
        attend: from q ``[..., S, heads, D]``, k and v to ``[..., S, heads, D]``.
        direct: from the same to the kernels that attend would launch, or None; None where only attend is known.
    """

    norm: Norm
    qkv: Product
    o: Product
    heads: int
    kv_heads: int
    head_dim: int
    tables: tuple[Tensor, Tensor] | None
    interleaved: bool
    q_norm: Norm | None
    k_norm: Norm | None
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    dropout: float
    keep: str
    direct: Callable[[Tensor, Tensor, Tensor], Direct | None] | None = None

    def parts(self, whole: Tensor, leading: Sequence[int]) -> list[Tensor]:
        """Views ``[..., heads, D]`` of q, k and v in ``[M, N]``."""
        heads = [self.heads, self.kv_heads, self.kv_heads]
        return list(whole.view(*leading, sum(heads), self.head_dim).split(heads, -2))


def _batched(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 3 else x


def _turn(block: Attention, q: Tensor, k: Tensor, **settings: Any) -> None:
    from ft_kernels.ops.rope import kernels

    assert block.tables is not None
    kernels.rotate(_batched(q), _batched(k), *block.tables, interleaved=block.interleaved, **settings)


def _norm_heads(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """Normed heads in memory of their own, and 1/rms; without a norm the very tensor."""
    if norm is None:
        return x, None
    from ft_kernels.ops.rms_norm import kernels

    return kernels.forward(x, norm.weight, norm.eps, norm.offset)[:2]


@dataclass(eq=False)
class _Inputs:
    """What the attention gets, and what its inputs came from.

    Attributes:
        qkv: ``[M, N]``; q and k are turned in it, unless they are normed: these have memory of their own.
    """

    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    q_rstd: Tensor | None
    k_rstd: Tensor | None

    def known(self) -> list[Tensor]:
        return [self.qkv, *([] if self.q_rstd is None else [self.q]), *([] if self.k_rstd is None else [self.k])]


def _inputs(block: Attention, qkv: Tensor, leading: Sequence[int], turned: bool = False) -> _Inputs:
    """Norm and turn what the product made. What lies in qkv is not turned again where it was."""
    q, k, v = block.parts(qkv, leading)
    (q, q_rstd), (k, k_rstd) = _norm_heads(q, block.q_norm), _norm_heads(k, block.k_norm)
    if block.tables is not None:
        if not turned:
            _turn(block, q, k, inplace=True)
        else:
            # Those with a norm are new, the others were turned by forward: no heads of these.
            _turn(block, q if q_rstd is not None else q[..., :0, :], k if k_rstd is not None else k[..., :0, :],
                  inplace=True)  # fmt: skip
    return _Inputs(qkv, q, k, v, q_rstd, k_rstd)


def _project(
    block: Attention, row: Tensor, low: Low, drop: Drop, tail: Tensor | None, leading: Sequence[int]
) -> tuple[_Inputs, Tensor]:
    qkv, tail = products.forward(row, block.qkv.base, low, block.qkv.bias, drop, tail=tail)
    return _inputs(block, qkv, leading), tail


def _checked(block: Attention, out: Tensor, q: Tensor) -> Tensor:
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(
            f"attention_block: attention gave {list(out.shape)} in {out.dtype}; "
            f"it needs q's {list(q.shape)} in {q.dtype}"
        )
    return out


@dataclass(frozen=True, eq=False)
class _Graph:
    """The attention's way back.

    Attributes:
        way: the graph of the caller's function, or kernels.
        reads_output: whether it wants the output.
    """

    way: Recorded | Direct
    reads_output: bool

    def backward(
        self, grad: Tensor, given: _Inputs, out: Tensor | None, kept: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        if isinstance(self.way, Recorded):
            return self.way.backward(grad, [*given.known(), out], kept)
        assert out is not None
        return self.way.backward(grad, given.q, given.k, given.v, out, kept[0])


def _attend(block: Attention, given: _Inputs) -> tuple[Tensor, _Graph, list[Tensor]]:
    """The output, the way back, and what must be kept for it beside the inputs and the output."""
    inputs = (given.q, given.k, given.v)
    kernels = None if block.direct is None else block.direct(*inputs)
    if kernels is not None:
        out, lse = kernels.forward(*inputs)
        return out, _Graph(kernels, True), [lse]
    known = given.known()
    out, graph, kept = record(lambda q, k, v: _checked(block, block.attend(q, k, v), q), inputs, known)
    return out, _Graph(graph, any(not isinstance(p, int) and p.index == len(known) for p in graph.saved)), kept


def _output(block: Attention, given: _Inputs) -> Tensor:
    """The output alone."""
    inputs = (given.q, given.k, given.v)
    kernels = None if block.direct is None else block.direct(*inputs)
    return _checked(block, block.attend(*inputs), given.q) if kernels is None else kernels.forward(*inputs)[0]


def run(block: Attention, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
    """The block without anything kept."""
    with torch.autocast(x.device.type, enabled=False):
        first, second = (p.low(*ab) for p, ab in _sides(block, adapters))
        drop, drop_out = drops(block.dropout, seed)
        rows = as_rows(x)
        row, _ = normed(rows, block.norm, first)
        given, _ = _project(block, row, first, drop, None, x.shape[:-1])
        del row
        out = _output(block, given)
        del given
        o = as_rows(out.flatten(-2))
        y, _ = products.forward(o, block.o.base, second, block.o.bias, drop_out, residual=rows)
        return y.view(x.shape)


def _sides(block: Attention, adapters: Sequence[Any]) -> list[tuple[Product, tuple[Any, Any]]]:
    both = (block.qkv, block.o)
    return list(zip(both, split_adapters(both, adapters), strict=True))


class AttentionBlock(torch.autograd.Function):
    """:func:`run` with a backward."""

    @staticmethod
    def forward(ctx: Any, block: Attention, x: Tensor, seed: Tensor | None, *adapters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            first, second = (p.low(*ab) for p, ab in _sides(block, adapters))
            drop, drop_out = drops(block.dropout, seed)
            rows, keep = as_rows(x), block.keep
            row: Tensor | None
            row, rstd = normed(rows, block.norm, first)
            given, tail = _project(block, row, first, drop, None, x.shape[:-1])
            if keep != "all" or not first.r:
                row = None
            q, k, q_rstd, k_rstd = given.q, given.k, given.q_rstd, given.k_rstd
            qkv: Tensor | None = given.qkv
            graph: _Graph | None = None
            kept: list[Tensor] = []
            if keep == "none":
                out = _output(block, given)
            else:
                out, graph, kept = _attend(block, given)
            del given
            o = as_rows(out.flatten(-2))
            y, tail_out = products.forward(o, block.o.base, second, block.o.bias, drop_out, residual=rows)
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
            sides = _sides(block, adapters)
            first, second = (p.low(*ab) for p, ab in sides)
            drop, drop_out = drops(block.dropout, seed)
            rows, leading, dys, graph = as_rows(x), x.shape[:-1], as_rows(dy), ctx.graph
            need_first = [any(n) for n in needs[0]]
            given = None
            if qkv is not None and q is None and k is None:
                given = _inputs(block, qkv, leading, turned=True)
            elif qkv is not None:
                views = block.parts(qkv, leading)
                given = _Inputs(qkv, views[0] if q is None else q, views[1] if k is None else k, views[2],
                                q_rstd, k_rstd)  # fmt: skip
            elif need_x or any(need_first) or block.keep == "none":
                row, rstd = normed(rows, block.norm, first)
                given, _ = _project(block, row, first, drop, tail, leading)
                if not first.r:
                    row = None
            if block.keep == "none":
                assert given is not None
                out, graph, kept = _attend(block, given)
            o = dys if out is None else as_rows(out.flatten(-2))
            dout, flat_out = products.backward(
                dys, o, tail_out, block.o.base, second, drop_out,
                need_x=need_x or any(need_first), need_a=any(needs[1][0]), need_b=any(needs[1][1]), dense=True,
            )  # fmt: skip
            dx = flat = None
            if dout is not None:
                assert given is not None
                heads = (*leading, block.heads, block.head_dim)
                grads = graph.backward(dout.view(heads), given, out, kept)
                del dout, out, kept
                joint = _joint(block, grads, given, leading)
                del given, grads
                # Gradients of A need the normed rows, which a kernel makes as it reads x.
                if row is None and need_first[0] and not products.norms_rows(rows, first):
                    row, rstd = normed(rows, block.norm, first)
                dn, flat = products.backward(
                    joint, rows if row is None else row, tail, block.qkv.base, first, drop,
                    need_x=need_x, need_a=need_first[0], need_b=need_first[1],
                    norm=row_norm(block.norm, rstd) if row is None and need_first[0] else None,
                )  # fmt: skip
                if dn is not None:
                    dx = normed_backward(dn, rows, block.norm, rstd, dys).view(x.shape)
        result: list[Tensor | None] = []
        for side, need, part in zip(sides, needs, (flat, flat_out), strict=True):
            a, b = side[1]
            da, db = unflatten(part, a, b, *need) if part is not None else ([None] * len(a), [None] * len(b))
            result += [*da, *db]
        return None, dx, None, *result


def _joint(block: Attention, grads: Sequence[Tensor | None], given: _Inputs, leading: Sequence[int]) -> Tensor:
    """The gradient of what the product made, ``[M, N]``, from those of q, k and v as the attention got them."""
    joint = dispatch.allocate(given.qkv.shape, given.qkv.dtype, given.qkv.device)
    targets = block.parts(joint, leading)
    sources = block.parts(given.qkv, leading)
    dq, dk, dv = (target.new_zeros(target.shape) if d is None else d for d, target in zip(grads, targets, strict=True))
    targets[2].copy_(dv)
    turned = [
        t if norm is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, norm in zip(targets, (block.q_norm, block.k_norm), strict=False)
    ]
    if block.tables is not None:
        _turn(block, dq, dk, back=True, out=(_batched(turned[0]), _batched(turned[1])))
    else:
        turned = [
            d if norm is not None else t.copy_(d)
            for t, d, norm in zip(turned, (dq, dk), (block.q_norm, block.k_norm), strict=True)
        ]
    norms = ((block.q_norm, given.q_rstd), (block.k_norm, given.k_rstd))
    for d, source, target, (norm, rstd) in zip(turned, sources, targets, norms, strict=False):
        if norm is not None and rstd is not None:
            from ft_kernels.ops.rms_norm import kernels

            kernels.backward(d, source, norm.weight, rstd, norm.offset, False, None, target)
    return joint
