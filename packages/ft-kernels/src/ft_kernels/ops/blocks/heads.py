"""The attention of a block: its heads normed and turned where the product made them, itself, and its way back.

It is a function of the caller's, whose graph is recorded without its memory (see ``recorded``), or kernels that are
launched without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ft_kernels.ops.blocks.parts import Norm, Product, split_adapters
from ft_kernels.ops.blocks.recorded import Recorded, record
from ft_kernels.ops.packed_attention.direct import Direct
from ft_kernels.ops.packed_attention.shared import SharedDirect

__all__ = ["Attention", "Inputs", "Way", "attend", "batched", "inputs", "joined", "output", "sides"]


@dataclass(frozen=True, eq=False)
class Attention:
    """What does not change from call to call, or is no activation.

    Attributes:
        tables: cos and sin as the rotation's kernel takes them, or None for no rotation.
        attend: from q ``[..., S, heads, D]``, k and v to ``[..., S, heads, D]``.
        direct: from the same to the kernels that attend would launch, or None; None where only attend is known.
        tile: rows at a time (see ``attention_tiles``); None for all.
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
    direct: Callable[[Tensor, Tensor, Tensor], Direct | SharedDirect | None] | None = None
    tile: int | None = None

    def parts(self, whole: Tensor, leading: Sequence[int]) -> list[Tensor]:
        """Views ``[..., heads, D]`` of q, k and v in ``[M, N]``."""
        heads = [self.heads, self.kv_heads, self.kv_heads]
        return list(whole.view(*leading, sum(heads), self.head_dim).split(heads, -2))


def batched(x: Tensor) -> Tensor:
    """Heads ``[S, heads, D]`` as those of one sequence; others as they are."""
    return x.unsqueeze(0) if x.dim() == 3 else x


def _turn(block: Attention, tables: tuple[Tensor, Tensor], q: Tensor, k: Tensor, **settings: Any) -> None:
    from ft_kernels.ops.rope import kernels

    kernels.rotate(batched(q), batched(k), *tables, interleaved=block.interleaved, **settings)


def _norm_heads(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """Normed heads in memory of their own, and 1/rms; without a norm the very tensor."""
    if norm is None:
        return x, None
    from ft_kernels.ops.rms_norm import kernels

    return kernels.forward(x, norm.weight, norm.eps, norm.offset)[:2]


@dataclass(eq=False)
class Inputs:
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


def inputs(block: Attention, qkv: Tensor, leading: Sequence[int], turned: bool = False) -> Inputs:
    """Norm and turn what the product made. What lies in qkv is not turned again where it was."""
    q, k, v = block.parts(qkv, leading)
    (q, q_rstd), (k, k_rstd) = _norm_heads(q, block.q_norm), _norm_heads(k, block.k_norm)
    if block.tables is not None:
        if not turned:
            _turn(block, block.tables, q, k, inplace=True)
        else:
            # Those with a norm are new, the others were turned by forward: no heads of these.
            new = (t if rstd is not None else t[..., :0, :] for t, rstd in ((q, q_rstd), (k, k_rstd)))
            _turn(block, block.tables, *new, inplace=True)
    return Inputs(qkv, q, k, v, q_rstd, k_rstd)


def _checked(block: Attention, out: Tensor, q: Tensor) -> Tensor:
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(
            f"attention_block: attention gave {list(out.shape)} in {out.dtype}; "
            f"it needs q's {list(q.shape)} in {q.dtype}"
        )
    return out


@dataclass(frozen=True, eq=False)
class Way:
    """The attention's way back.

    Attributes:
        way: the graph of the caller's function, or kernels.
        reads_output: whether it wants the output.
    """

    way: Recorded | Direct | SharedDirect
    reads_output: bool

    def backward(
        self, grad: Tensor, given: Inputs, out: Tensor | None, kept: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        if isinstance(self.way, Recorded):
            return self.way.backward(grad, [*given.known(), out], kept)
        assert out is not None
        return self.way.backward(grad, given.q, given.k, given.v, out, kept)


def attend(block: Attention, given: Inputs) -> tuple[Tensor, Way, list[Tensor]]:
    """The output, the way back, and what must be kept for it beside the inputs and the output."""
    inputs = (given.q, given.k, given.v)
    kernels = None if block.direct is None else block.direct(*inputs)
    if kernels is not None:
        out, kept = kernels.forward(*inputs)
        return out, Way(kernels, True), kept
    known = given.known()
    out, graph, kept = record(lambda q, k, v: _checked(block, block.attend(q, k, v), q), inputs, known)
    return out, Way(graph, any(not isinstance(p, int) and p.index == len(known) for p in graph.saved)), kept


def output(block: Attention, given: Inputs) -> Tensor:
    """The output alone."""
    inputs = (given.q, given.k, given.v)
    kernels = None if block.direct is None else block.direct(*inputs)
    return _checked(block, block.attend(*inputs), given.q) if kernels is None else kernels.forward(*inputs)[0]


def sides(block: Attention, adapters: Sequence[Any]) -> list[tuple[Product, tuple[Any, Any]]]:
    both = (block.qkv, block.o)
    return list(zip(both, split_adapters(both, adapters), strict=True))


def joined(
    block: Attention,
    grads: Sequence[Tensor | None],
    qkv: Tensor | None,
    rstds: Sequence[Tensor | None],
    tables: tuple[Tensor, Tensor] | None,
    joint: Tensor,
    leading: Sequence[int],
) -> None:
    """The gradient of what the product made, into ``joint [M, N]``.

    Args:
        grads: of q, k and v ``[*leading, heads, D]`` as the attention got them; None for zeros.
        qkv: what the product made, ``[M, N]``; only where q or k is normed. rstds: of q and k.
        tables: cos and sin of these tokens.
    """
    targets = block.parts(joint, leading)
    dq, dk, dv = (target.new_zeros(target.shape) if d is None else d for d, target in zip(grads, targets, strict=True))
    targets[2].copy_(dv)
    turned = [
        t if norm is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, norm in zip(targets, (block.q_norm, block.k_norm), strict=False)
    ]
    if tables is not None:
        _turn(block, tables, dq, dk, back=True, out=(batched(turned[0]), batched(turned[1])))
    else:
        turned = [
            d if norm is not None else t.copy_(d)
            for t, d, norm in zip(turned, (dq, dk), (block.q_norm, block.k_norm), strict=True)
        ]
    sources = [None, None] if qkv is None else block.parts(qkv, leading)[:2]
    norms = zip((block.q_norm, block.k_norm), rstds, strict=True)
    for d, source, target, (norm, rstd) in zip(turned, sources, targets, norms, strict=False):
        if norm is not None and rstd is not None and source is not None:
            from ft_kernels.ops.rms_norm import kernels

            kernels.backward(d, source, norm.weight, rstd, norm.offset, False, None, target)
