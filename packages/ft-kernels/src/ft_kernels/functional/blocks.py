"""The halves of a decoder layer, each a single operation with as little memory traffic as possible."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.functional.attention import direct_attention, packed_attention
from ft_kernels.functional.lora_mlp import Activation
from ft_kernels.functional.lora_weights import BaseWeight, Part, base_of
from ft_kernels.functional.rope import RopeLayout, _check, _for_tokens, _pairs
from ft_kernels.ops.blocks import attention as attention_ops
from ft_kernels.ops.blocks import mlp as mlp_ops
from ft_kernels.ops.blocks import reference
from ft_kernels.ops.blocks.parts import Norm, Product
from ft_kernels.ops.glu.reference import KINDS
from ft_kernels.ops.lora.arguments import Adapters, check_product, draw_seed, numbers
from ft_kernels.ops.lora.operands import Base
from ft_kernels.ops.packed_attention.direct import Direct

__all__ = ["Keep", "Norm", "attention_block", "mlp_block"]

Keep = Literal["all", "most", "inputs", "none"]
_OF_DIRECT_ATTENTION = frozenset(inspect.signature(direct_attention).parameters)


def attention_block(
    x: Tensor,
    norm: Norm,
    qkv: BaseWeight | Sequence[Part],
    o: BaseWeight,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    scaling: float | Sequence[float] = 1.0,
    bias: Sequence[Tensor | None] | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    rotary_dim: int | None = None,
    layout: RopeLayout = "half",
    dropout: float = 0.0,
    training: bool = True,
    keep: Keep = "most",
) -> Tensor:
    """``x + o(attention(rope(q_norm(q)), rope(k_norm(k)), v))`` with ``q, k, v = qkv(rms_norm(x))``.

    The first half of a decoder layer that normalizes before (Llama, Mistral, Qwen). The products are those of
    :func:`lora_qkv` and :func:`lora_linear`, with low-rank updates of frozen weights inside. The norm writes into the
    product's own input, the rotation into its output, and x is added by the last product (with a bias, in fp32, or
    where a plain weight has an update: after it), so that no other pass goes over memory.

    ``keep`` is what stays in memory between forward and backward, in bytes a token, with e bytes an element, H the
    width of x, N and G the widths of q and k, r and s the ranks of q, k and v together and of o, each rounded up to a
    multiple of 16, w(n) the next multiple of 64, f = 4 (8 in fp32, or for norms of up to 32 numbers), and T what
    ``attention`` keeps of its own (its output N·e, and for torch's and our kernels 4 · heads):

    ========== =======================================================================================================
    "all"      (H + N + 2·G + r + s)·e + f + T, and for the normed rows w(H + r)·e. With norms of q and k,
               (N + G)·e + (heads + kv_heads)·f more.
    "most"     (H + N + 2·G + r + s)·e + f + T. In 16 bits, for up to 128 ranks, the kernel that sums A's gradient
               norms x as it reads it, which costs no pass over memory: so this is the default. Elsewhere the norm is
               computed again, and where q and k are normed these and their rotation are.
    "inputs"   (H + r + s)·e + T: the product for q, k and v is computed again.
    "none"     (H + r + s)·e: the attention too.
    ========== =======================================================================================================

    What needs no gradient is left out: r, s, the normed rows or the output where there are no adapters. Gradients are
    the same bit for bit with each, as far as ``attention`` itself gives the same twice.

    Args:
        x: ``[B, S, H]`` or ``[S, H]`` in the weights' dtype, any strides.
        norm: before the product; its weight ``[H]``.
        qkv: the weights of q, k and v, one below the other or as a list, in a form that :func:`lora_qkv` takes; frozen.
        o: ``[H, heads · head_dim]``, in a form that :func:`lora_linear` takes; frozen.
        a, b: of q, k, v and o, each a tensor or None; all of one dtype. All None: gradients of x alone.
        heads, kv_heads, head_dim: of the attention.
        cos, sin: angles of x's tokens, ``[S, n]`` or ``[B or 1, S, n]``, as :func:`rope` takes them; None for both
            where nothing is rotated.
        attention: from q ``[..., S, heads, D]``, k and v ``[..., S, kv_heads, D]`` to ``[..., S, heads, D]``, by
            operations that autograd can differentiate and that write over none of the three (a
            ``functools.partial(packed_attention, plan=plan)``, whose kernels are then launched without a graph around
            them). It gets no other gradients than theirs; with "none" it
            is called again in backward, and must then draw no random numbers.
        scaling: of the updates; one number, or one for each of q, k, v and o.
        bias: of q, k, v and o, each ``[N_i]`` or None; frozen. None for none.
        q_norm, k_norm: norms of each head before the rotation (Qwen3); weights ``[head_dim]``.
        rotary_dim, layout: as for :func:`rope`.
        dropout: from 0 to below 1, of the adapters' inputs. training: whether it is on.
        keep: see above. Without the kernels (on a CPU, in float64) it has no effect, and autograd keeps what it does.

    Returns:
        ``[..., S, H]`` in x's dtype. Gradients come back for x, a and b, once: a second backward through the same
        graph raises a RuntimeError unless keep is "none".

        Under autocast everything is computed in x's dtype all the same. ``torch.compile`` does not look into the
        block: the graph breaks around it.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices or settings do not fit, or a frozen tensor requires a gradient.
    """
    name = "attention_block"
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    first, second = base_of(name, qkv), base_of(name, o)
    _check_rows(name, x, (first, second), keep)
    if min(heads, kv_heads, head_dim) < 1 or first.n != sum(sizes) or second.k != sizes[0]:
        raise ValueError(
            f"{name}: heads={heads}, kv_heads={kv_heads} and head_dim={head_dim} make {sizes} outputs; qkv has "
            f"{first.n} in all, o {second.k} inputs"
        )
    for what, own, width in (("norm", norm, x.shape[-1]), ("q_norm", q_norm, head_dim), ("k_norm", k_norm, head_dim)):
        _check_norm(name, what, own, x, width)
    factors, biases, (one, two) = _adapters(name, a, b, scaling, bias, (sizes, [second.n]))
    _check_products(name, x, (first, second), (one, two), biases, dropout)
    p = dropout if training else 0.0
    turned = {"rotary_dim": rotary_dim, "layout": layout}
    tables = _tables(x, heads, kv_heads, head_dim, cos, sin, rotary_dim, layout)
    norms = [n.weight for n in (norm, q_norm, k_norm) if n is not None]
    if not x.numel() or not use_triton(x, *norms, *(tables or ())):
        with torch.autocast(x.device.type, enabled=False):
            return reference.attention_block(
                x, norm, qkv, o, a, b, heads=heads, kv_heads=kv_heads, head_dim=head_dim, cos=cos, sin=sin,
                attention=attention, scaling=factors, bias=biases, q_norm=q_norm, k_norm=k_norm, dropout=dropout,
                training=training, **turned,
            )  # fmt: skip
    block = attention_ops.Attention(
        norm, _product(x, first, one, biases[:3], sizes), _product(x, second, two, biases[3:], [second.n]),
        heads, kv_heads, head_dim, tables, layout == "interleaved", q_norm, k_norm, attention, p, keep,
        _kernels_of(attention),
    )  # fmt: skip
    every = [*one.a, *one.b, *two.a, *two.b]
    seed = draw_seed(x, p, 2) if every else None
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *every))
    return _untraced(attention_ops.AttentionBlock.apply if recorded else attention_ops.run, block, x, seed, *every)


def _kernels_of(attention: Callable[..., Tensor]) -> Callable[..., Direct | None] | None:
    """From q, k and v to the kernels that a partial of packed_attention launches."""
    if not isinstance(attention, functools.partial) or attention.func is not packed_attention or attention.args:
        return None
    known = attention.keywords.keys() <= _OF_DIRECT_ATTENTION
    return functools.partial(direct_attention, **attention.keywords) if known else None


def mlp_block(
    x: Tensor,
    norm: Norm,
    gate_up: BaseWeight | Sequence[Part],
    down: BaseWeight,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    activation: Activation = "silu",
    scaling: float | Sequence[float] = 1.0,
    bias: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    training: bool = True,
    keep: Keep = "most",
) -> Tensor:
    """``x + down(activation(gate(n)) · up(n))`` with ``n = rms_norm(x)``.

    The second half of a decoder layer that normalizes before. The product is that of :func:`lora_mlp`; the norm writes
    into its input, and x is added by its last product, so that no other pass goes over memory.

    ``keep``, in bytes a token, with the letters of :func:`attention_block`, I the width of gate and of up, r the ranks
    of both, and s that of down:

    ========== ==================================================================================
    "all"      (H + 2·I + r + s)·e + f, and for the normed rows w(H + r)·e.
    "most"     (H + 2·I + r + s)·e + f: the norm is computed again, as for :func:`attention_block`.
    "inputs"   (H + r + s)·e: the product for gate and up is computed again. "none" is the same.
    ========== ==================================================================================

    The product of the activation and up is never kept: the pass that makes the gradients of gate and up, which it
    writes over them, makes it again.

    Args:
        x, norm, scaling, bias, dropout, training, keep: as for :func:`attention_block`, of gate, up and down.
        gate_up: gate's weight above up's, ``[2·I, H]``, in a form that :func:`lora_qkv` takes, or both as a list.
        down: ``[H, I]``, in a form that :func:`lora_linear` takes.
        a, b: of gate, up and down, each a tensor or None; all of one dtype.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        ``[..., H]`` in x's dtype. Gradients come back for x, a and b; with "all" or "most" once, a second backward
        through the same graph raises a RuntimeError.

    Raises:
        TypeError, ValueError: as :func:`attention_block`.
    """
    name = "mlp_block"
    if activation not in KINDS:
        raise ValueError(f"{name}: activation={activation!r}; allowed are {', '.join(map(repr, KINDS))}")
    first, second = base_of(name, gate_up), base_of(name, down)
    _check_rows(name, x, (first, second), keep)
    width = second.k
    if first.n != 2 * width:
        raise ValueError(f"{name}: gate_up has {first.n} outputs, down {width} inputs; gate_up needs twice as many")
    _check_norm(name, "norm", norm, x, x.shape[-1])
    factors, biases, (one, two) = _adapters(name, a, b, scaling, bias, ([width, width], [second.n]))
    _check_products(name, x, (first, second), (one, two), biases, dropout)
    p = dropout if training else 0.0
    if not x.numel() or not use_triton(x, norm.weight):
        with torch.autocast(x.device.type, enabled=False):
            return reference.mlp_block(
                x, norm, gate_up, down, a, b, activation=activation, scaling=factors, bias=biases, dropout=dropout,
                training=training,
            )  # fmt: skip
    block = mlp_ops.MLP(
        norm, _product(x, first, one, biases[:2], [width, width]), _product(x, second, two, biases[2:], [second.n]),
        KINDS.index(activation), p, keep,
    )  # fmt: skip
    every = [*one.a, *one.b, *two.a, *two.b]
    seed = draw_seed(x, p, 2) if every else None
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *every))
    return _untraced(mlp_ops.MLPBlock.apply if recorded else mlp_ops.run, block, x, seed, *every)


def _untraced(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call what torch.compile must not look into: it launches kernels itself, and one argument is a function."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def _check_rows(name: str, x: Tensor, bases: tuple[Base, Base], keep: str) -> None:
    first, second = bases
    if keep not in get_args(Keep):
        raise ValueError(f"{name}: keep={keep!r}; allowed are {', '.join(map(repr, get_args(Keep)))}")
    if x.dim() < 2 or (name == "attention_block" and x.dim() > 3) or x.shape[-1] != first.k:
        leading = "[S, {0}] or [B, S, {0}]" if name == "attention_block" else "[..., {0}]"
        raise ValueError(f"{name}: x has shape {list(x.shape)}; the weights need {leading.format(first.k)}")
    if second.n != first.k:
        raise ValueError(f"{name}: the last weight has {second.n} outputs; x has {first.k}, to which they are added")
    for base in bases:
        dtype = base.tensors[0].dtype
        if not base.quantized and dtype != x.dtype:
            raise TypeError(f"{name}: x has dtype {x.dtype}, a weight {dtype}; use one dtype, that of the weights")


def _check_norm(name: str, what: str, norm: Norm | None, x: Tensor, width: int) -> None:
    if norm is None:
        return
    weight = norm.weight
    if not weight.is_floating_point():
        raise TypeError(f"{name}: {what} has a weight of dtype {weight.dtype}; use a floating-point dtype")
    if list(weight.shape) != [width] or weight.device != x.device:
        raise ValueError(
            f"{name}: {what} has a weight {list(weight.shape)} on {weight.device}; it needs [{width}] on {x.device}"
        )
    _check_frozen(name, f"the weight of {what}", weight)


def _check_frozen(name: str, what: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: {what} requires a gradient, which is not computed here; freeze it (requires_grad_(False)), or "
            "train it with the single functions"
        )


def _adapters(
    name: str,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    scaling: float | Sequence[float],
    bias: Sequence[Tensor | None] | None,
    sizes: tuple[list[int], list[int]],
) -> tuple[list[float], list[Tensor | None], tuple[Adapters, Adapters]]:
    """A factor and a bias for each projection, and each product's adapters."""
    split, count = len(sizes[0]), len(sizes[0]) + 1
    if len(a) != count or len(b) != count:
        raise ValueError(f"{name}: there are {len(a)} a and {len(b)} b; give {count} of each, None where there is none")
    biases: list[Tensor | None] = [None] * count if bias is None else list(bias)
    if len(biases) != count:
        raise ValueError(f"{name}: there are {len(biases)} biases; give {count}, None where there is none")
    for shift, n in zip(biases, [*sizes[0], *sizes[1]], strict=True):
        if shift is not None and (shift.shape != (n,) or not shift.is_floating_point()):
            raise ValueError(f"{name}: a bias has shape {list(shift.shape)} and dtype {shift.dtype}; it needs [{n}]")
        if shift is not None:
            _check_frozen(name, "a bias", shift)
    factors = numbers(name, scaling, count)
    one = Adapters.some(name, a[:split], b[:split], sizes[0], factors[:split])
    two = Adapters.some(name, a[split:], b[split:], sizes[1], factors[split:])
    dtypes = sorted({str(t.dtype) for t in (*one.a, *two.a)})
    if len(dtypes) > 1:
        raise TypeError(f"{name}: the adapters have dtypes {dtypes}; use one for all")
    return factors, biases, (one, two)


def _check_products(
    name: str,
    x: Tensor,
    bases: tuple[Base, Base],
    adapters: tuple[Adapters, Adapters],
    biases: Sequence[Tensor | None],
    dropout: float,
) -> None:
    for base, own in zip(bases, adapters, strict=True):
        check_product(name, x.new_empty(0, base.k), base, own, None, dropout)
    if any(shift is not None and shift.device != x.device for shift in biases):
        raise ValueError(f"{name}: a bias is not on {x.device}, where x is; use one device")


def _product(
    x: Tensor, base: Base, adapters: Adapters, biases: Sequence[Tensor | None], sizes: Sequence[int]
) -> Product:
    bias = None
    if any(shift is not None for shift in biases):
        parts = [x.new_zeros(n) if t is None else t.to(x.dtype) for t, n in zip(biases, sizes, strict=True)]
        bias = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Product(base, adapters.starts, adapters.scaling, bias)


def _tables(
    x: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    rotary_dim: int | None,
    layout: str,
) -> tuple[Tensor, Tensor] | None:
    """cos and sin ``[1, B, S, pairs]``."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("attention_block: only one of cos and sin is given; give both, or None for both")
        return None
    q, k = (x.new_empty(0).expand(*x.shape[:-1], n, 0) for n in (heads, kv_heads))
    _check(q, k, cos, sin, None, layout, -2)
    pairs = _pairs(head_dim, cos.shape[-1], rotary_dim)
    batches, length = (1, *x.shape[:-1])[-2:]
    first, second = (_for_tokens("cos and sin", t.detach(), [], batches, length, 1)[..., :pairs] for t in (cos, sin))
    return first, second
