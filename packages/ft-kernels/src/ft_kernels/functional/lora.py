"""Linear products with low-rank updates (LoRA) of a frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ft_kernels.functional.lora_weights import (
    BaseWeight,
    Fp8Weight,
    Int8Weight,
    NF4Weight,
    Part,
    WideWeight,
    base_of,
    widen,
)
from ft_kernels.ops.lora import reference
from ft_kernels.ops.lora.arguments import Adapters, check_product, draw_seed, numbers
from ft_kernels.ops.lora.autograd import lora_linear_op, lora_row_norms_op
from ft_kernels.ops.lora.operands import Base

__all__ = [
    "BaseWeight",
    "Fp8Weight",
    "Int8Weight",
    "NF4Weight",
    "WideWeight",
    "joined_bias",
    "lora_linear",
    "lora_qkv",
    "widen",
]


def lora_linear(
    x: Tensor,
    weight: BaseWeight,
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    magnitude: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """``x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ + bias`` with W frozen.

    LoRA: Low-Rank Adaptation of Large Language Models, equation 3 (Hu et al. 2021, arXiv:2106.09685). rsLoRA
    (Kalajdzievski 2023, arXiv:2312.03732) is a scaling of alpha / sqrt(r). With ``magnitude``, DoRA's equation 5 (Liu
    et al. 2024, arXiv:2402.09353) as PEFT has it, each row's norm taken as a constant:
    ``magnitude / ‖W + scaling · B A‖ ⊙ (x Wᵀ + scaling · x Aᵀ Bᵀ) + bias``.

    From a :class:`WideWeight` (see :func:`widen`) or a quantized weight that is expanded for the product this is one
    matrix product over K + r numbers, rounded once. From a plain tensor or an fp8 weight it is two products and a sum.
    For backward x is kept, and r numbers a row; of a quantized weight nothing, it is expanded again.

    Args:
        x: ``[..., K]`` in the weight's dtype (any dtype under autocast), any strides. For a WideWeight also a whole row
            buffer ``[..., width]`` with x in its left part, whose tail is filled here; that gets no gradient.
        weight: ``[N, K]``, frozen: a tensor, a WideWeight, an NF4Weight, an Int8Weight or an Fp8Weight.
        a: ``[r, K]``, any dtype and rank. b: ``[N, r]``, of a's dtype. Several adapters that are on at the same time
            are given as sequences.
        scaling: of the update; one number, or one for each adapter.
        bias: ``[N]`` or None.
        dropout: from 0 to below 1, of the adapters' input, each adapter with its own random numbers.
        magnitude: ``[N]`` for DoRA, or None.
        training: whether dropout is on.

    Returns:
        ``[..., N]`` in the weight's dtype. The products run in the weight's dtype, whatever the adapters'; gradients
        come back for x, a, b, bias and magnitude in the dtype of each. Rows of x's gradient may have a gap between.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices or settings do not fit, or the weight requires a gradient.
    """
    base = base_of("lora_linear", weight)
    downs, ups = _listed(a), _listed(b)
    starts = [0] * len(downs)
    outputs = [base.n] * len(downs)
    adapters = Adapters("lora_linear", downs, ups, starts, numbers("lora_linear", scaling, len(downs)), outputs)
    if magnitude is not None and len(downs) != 1:
        raise ValueError(
            f"lora_linear: magnitude is for one adapter, but there are {len(downs)}; give it to one call each"
        )
    magnitudes = [magnitude] * len(downs)
    return _product("lora_linear", x, base, adapters, bias, dropout if training else 0.0, magnitudes)


def lora_qkv(
    x: Tensor,
    weight: BaseWeight | Sequence[Part],
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    scaling: float | Sequence[float] = 1.0,
    sizes: Sequence[int] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    magnitude: Sequence[Tensor | None] | None = None,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """Several :func:`lora_linear` of the same input (q, k and v; or gate and up) as one product.

    Args:
        x: as for :func:`lora_linear`.
        weight: the projections' weights one below the other, ``[N_q + N_k + N_v, K]``, in a form that
            :func:`lora_linear` takes, or a sequence of tensors or of quantized weights of one kind.
        a, b: a tensor, or None where a projection has no adapter, for each projection.
        scaling: one number, or one for each projection.
        sizes: N_q, N_k and N_v. Needed only where neither the weight nor b tells.
        bias: ``[N_q + N_k + N_v]``, or for each projection one or None.
        dropout, training: as for :func:`lora_linear`; each projection has its own random numbers. (With a magnitude,
            all have the same.)
        magnitude: for each projection one or None.

    Returns:
        Each projection's ``[..., N_i]``, views of one tensor. Gradients that lie side by side in the same way are used
        as they are; others are copied together.

    Raises:
        TypeError, ValueError: as :func:`lora_linear`.
    """
    base = base_of("lora_qkv", weight)
    count = len(a)
    if len(b) != count:
        raise ValueError(
            f"lora_qkv: there are {count} a and {len(b)} b; give one of each, or None, for each projection"
        )
    sizes = _sizes("lora_qkv", base, b, sizes)
    factors = numbers("lora_qkv", scaling, count)
    kept = [i for i in range(count) if a[i] is not None]
    adapters = Adapters.some("lora_qkv", a, b, sizes, factors)
    magnitudes = [None] * count if magnitude is None else list(magnitude)
    if len(magnitudes) != count or any(m is not None and i not in kept for i, m in enumerate(magnitudes)):
        raise ValueError(
            "lora_qkv: magnitude needs one vector, or None, for each projection, and only where an adapter is"
        )
    whole = joined_bias("lora_qkv", bias, sizes)
    y = _product("lora_qkv", x, base, adapters, whole, dropout if training else 0.0, [magnitudes[i] for i in kept])
    if torch.compiler.is_compiling() or not y.requires_grad:
        return tuple(y.split(list(sizes), -1))
    parts: tuple[Tensor, ...] = _Split.apply(y, tuple(sizes))  # type: ignore[no-untyped-call]
    return parts


class _Split(torch.autograd.Function):
    """``split`` along the last dimension, whose backward takes gradients that already lie side by side as they are."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        return tuple(part.view_as(part) for part in y.split(list(sizes), -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join(grads), None


def _join(parts: Sequence[Tensor]) -> Tensor:
    """``cat`` along the last dimension, without a copy where the parts are neighbours in one tensor."""
    first, offset = parts[0], 0
    for part in parts:
        beside = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.storage_offset() == first.storage_offset() + offset
            and part.stride() == first.stride()
            and part.shape[:-1] == first.shape[:-1]
        )
        if not beside or part.stride(-1) != 1 or part.dim() < 2:
            return torch.cat(list(parts), -1)
        offset += part.shape[-1]
    if offset > first.stride(-2):
        return torch.cat(list(parts), -1)
    return first.as_strided((*first.shape[:-1], offset), first.stride())


def _listed(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _sizes(name: str, base: Base, b: Sequence[Tensor | None], sizes: Sequence[int] | None) -> list[int]:
    if sizes is None:
        known = [None if up is None else up.shape[0] for up in b]
        sizes = base.sizes if len(base.sizes) == len(b) else [n for n in known if n is not None]
    if len(sizes) != len(b) or sum(sizes) != base.n:
        raise ValueError(
            f"{name}: projections of {list(sizes)} outputs do not make up the weight's {base.n} for {len(b)} adapters; "
            "give sizes, the outputs of each projection"
        )
    return list(sizes)


def joined_bias(name: str, bias: Tensor | Sequence[Tensor | None] | None, sizes: Sequence[int]) -> Tensor | None:
    """The biases of projections with so many outputs as one, zeros for those without."""
    if bias is None or isinstance(bias, Tensor):
        return bias
    shapes = [None if t is None else list(t.shape) for t in bias]
    if len(shapes) != len(sizes) or any(s not in (None, [n]) for s, n in zip(shapes, sizes, strict=True)):
        raise ValueError(
            f"{name}: bias has shapes {shapes}; give one, or None, for each projection: {[[n] for n in sizes]}"
        )
    some = next((t for t in bias if t is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(n) if t is None else t for t, n in zip(bias, sizes, strict=True)])


def _product(
    name: str, x: Tensor, base: Base, adapters: Adapters, bias: Tensor | None, dropout: float,
    magnitudes: list[Tensor | None],
) -> Tensor:  # fmt: skip
    x = check_product(name, x, base, adapters, bias, dropout)
    for magnitude, up in zip(magnitudes, adapters.b, strict=True):
        if magnitude is not None and (magnitude.shape != up.shape[:1] or magnitude.device != x.device):
            raise ValueError(
                f"{name}: magnitude {list(magnitude.shape)} on {magnitude.device} does not fit; "
                f"it needs [{up.shape[0]}] on {x.device}"
            )
    if any(m is not None for m in magnitudes):
        return _weight_decomposed(x, base, adapters, bias, dropout, magnitudes)
    return _linear(x, base, adapters, bias, dropout)


def _linear(x: Tensor, base: Base, adapters: Adapters, bias: Tensor | None, dropout: float) -> Tensor:
    seed = draw_seed(x, dropout) if adapters.a else None
    if bias is not None:
        bias = bias.to(x.dtype)
    settings = (adapters.a, adapters.b, adapters.starts, adapters.scaling, bias, dropout, seed)
    if x.dtype == torch.float64:
        weight = torch.cat(base.dense(x.dtype))
        return reference.lora_linear(x[..., : base.k], weight, *settings)
    y: Tensor = lora_linear_op(x, base.tensors, base.kind, base.k, base.sizes, base.meta, *settings)[0]
    return y


def _weight_decomposed(
    x: Tensor, base: Base, adapters: Adapters, bias: Tensor | None, dropout: float, magnitudes: list[Tensor | None]
) -> Tensor:
    """DoRA. With dropout PEFT drops the input of the base's rescaled share too, not that of the base itself."""
    form = (base.tensors, base.kind, base.k, base.sizes, base.meta)
    adapter = ([t.detach() for t in adapters.a], [t.detach() for t in adapters.b], adapters.starts, adapters.scaling)
    norms: Tensor = lora_row_norms_op(*form, *adapter, x.dtype)
    ends = {s: (n.shape[0], m) for s, n, m in zip(adapters.starts, adapters.b, magnitudes, strict=True)}
    factors, place = [], 0
    for start in sorted(ends):
        n, magnitude = ends[start]
        factors.append(norms.new_ones(start - place))
        place = start + n
        factors.append(norms.new_ones(n) if magnitude is None else magnitude.to(norms.dtype) / norms[start:place])
    factor = torch.cat([*factors, norms.new_ones(base.n - place)])
    x = x[..., : base.k]
    dropped = F.dropout(x, dropout) if dropout else x
    y = _linear(dropped, base, adapters, None, 0.0) * factor
    if dropout:
        nothing = Adapters("lora_linear", [], [], [], [], [])
        y = y + _linear(x - dropped, base, nothing, None, 0.0)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)
