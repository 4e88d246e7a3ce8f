"""The halves of a decoder layer with weights and adapters checked once, for layers that are called again and again."""

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
from ft_kernels.functional.rope import RopeLayout, check_rope, for_tokens, rotated_pairs
from ft_kernels.ops.blocks import attention as attention_ops
from ft_kernels.ops.blocks import attention_tiles, mlp_tiles, reference
from ft_kernels.ops.blocks import heads as heads_ops
from ft_kernels.ops.blocks import mlp as mlp_ops
from ft_kernels.ops.blocks.parts import Norm, Product
from ft_kernels.ops.glu.reference import KINDS
from ft_kernels.ops.lora.arguments import Adapters, check_product, draw_seed, numbers
from ft_kernels.ops.lora.operands import Base
from ft_kernels.ops.packed_attention.direct import Direct
from ft_kernels.ops.packed_attention.shared import SharedDirect

__all__ = ["AttentionBlock", "Keep", "MLPBlock"]

Keep = Literal["all", "most", "inputs", "none"]
_KEEP = get_args(Keep)
_OF_DIRECT_ATTENTION = frozenset(inspect.signature(direct_attention).parameters)


class AttentionBlock:
    """:func:`ft_kernels.attention_block` of one layer: arguments, errors and results are the same.

    What is checked here must stay as it is: the tensors, their shapes, dtypes and devices, and that frozen ones want no
    gradients. Their numbers may change.
    """

    def __init__(
        self,
        norm: Norm,
        qkv: BaseWeight | Sequence[Part],
        o: BaseWeight,
        a: Sequence[Tensor | None],
        b: Sequence[Tensor | None],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scaling: float | Sequence[float] = 1.0,
        bias: Sequence[Tensor | None] | None = None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        rotary_dim: int | None = None,
        layout: RopeLayout = "half",
        dropout: float = 0.0,
    ) -> None:
        name = "attention_block"
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        first, second = base_of(name, qkv), base_of(name, o)
        if min(heads, kv_heads, head_dim) < 1 or first.n != sum(sizes) or second.k != sizes[0]:
            raise ValueError(
                f"{name}: heads={heads}, kv_heads={kv_heads} and head_dim={head_dim} make {sizes} outputs; qkv has "
                f"{first.n} in all, o {second.k} inputs"
            )
        device = first.tensors[0].device
        for what, own, width in (("norm", norm, first.k), ("q_norm", q_norm, head_dim), ("k_norm", k_norm, head_dim)):
            _check_norm(name, what, own, device, width)
        factors, biases, adapters = _adapters(name, a, b, scaling, bias, (sizes, [second.n]))
        _check_products(name, (first, second), adapters, biases, dropout)
        self._products = _Products(name, (first, second), adapters, biases, (sizes, [second.n]), dropout)
        self._norms, self._able = (norm, q_norm, k_norm), use_triton(*(n.weight for n in (norm, q_norm, k_norm) if n))
        self._heads: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self._turned: dict[str, Any] = {"rotary_dim": rotary_dim, "layout": layout}
        named: dict[str, Any] = {
            "scaling": factors,
            "bias": biases,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "dropout": dropout,
        }
        self._reference: Callable[..., Tensor] = functools.partial(
            reference.attention_block, norm=norm, qkv=qkv, o=o, a=a, b=b, **self._heads, **self._turned, **named
        )

    def __call__(
        self,
        x: Tensor,
        *,
        cos: Tensor | None,
        sin: Tensor | None,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        training: bool = True,
        keep: Keep = "most",
        tile: int | None = None,
    ) -> Tensor:
        """``[..., S, H]``; the arguments are those of :func:`ft_kernels.attention_block`."""
        self._products.check(x, keep, tile)
        tables = _tables(x, **self._heads, cos=cos, sin=sin, **self._turned)
        if not self._able or not x.numel() or not use_triton(x, *(tables or ())):
            with torch.autocast(x.device.type, enabled=False):
                return self._reference(x, cos=cos, sin=sin, attention=attention, training=training)
        norm, q_norm, k_norm = self._norms
        p = self._products.dropout if training else 0.0
        tile = _tile_of(x, tile)
        block = heads_ops.Attention(
            norm, *self._products.of(x.dtype), **self._heads, tables=tables,
            interleaved=self._turned["layout"] == "interleaved", q_norm=q_norm, k_norm=k_norm, attend=attention,
            dropout=p, keep=keep, direct=_kernels_of(attention), tile=tile,
        )  # fmt: skip
        if tile is not None:
            return self._products.run(attention_tiles.TiledAttentionBlock.apply, attention_tiles.run, block, x, p)
        return self._products.run(attention_ops.AttentionBlock.apply, attention_ops.run, block, x, p)


class MLPBlock:
    """:func:`ft_kernels.mlp_block` of one layer: arguments, errors and results are the same.

    What is checked here must stay as it is: the tensors, their shapes, dtypes and devices, and that frozen ones want no
    gradients. Their numbers may change.
    """

    def __init__(
        self,
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
    ) -> None:
        name = "mlp_block"
        if activation not in KINDS:
            raise ValueError(f"{name}: activation={activation!r}; allowed are {', '.join(map(repr, KINDS))}")
        first, second = base_of(name, gate_up), base_of(name, down)
        sizes = ([second.k, second.k], [second.n])
        if first.n != 2 * second.k:
            raise ValueError(
                f"{name}: gate_up has {first.n} outputs, down {second.k} inputs; gate_up needs twice as many"
            )
        _check_norm(name, "norm", norm, first.tensors[0].device, first.k)
        factors, biases, adapters = _adapters(name, a, b, scaling, bias, sizes)
        _check_products(name, (first, second), adapters, biases, dropout)
        self._products = _Products(name, (first, second), adapters, biases, sizes, dropout)
        self._norm, self._kind, self._able = norm, KINDS.index(activation), use_triton(norm.weight)
        self._reference: Callable[..., Tensor] = functools.partial(
            reference.mlp_block, norm=norm, gate_up=gate_up, down=down, a=a, b=b, activation=activation,
            scaling=factors, bias=biases, dropout=dropout,
        )  # fmt: skip

    def __call__(
        self, x: Tensor, *, training: bool = True, keep: Keep = "most", answer: bool = True, tile: int | None = None
    ) -> Tensor:
        """``[..., H]``; the arguments are those of :func:`ft_kernels.mlp_block`.

        ``answer=False``: only the graph is wanted, by a caller who computes a layer again for its gradients. The last
        product is left out then, and the output is memory that nothing was written to.
        """
        self._products.check(x, keep, tile)
        if not self._able or not x.numel() or not use_triton(x):
            with torch.autocast(x.device.type, enabled=False):
                return self._reference(x, training=training)
        p = self._products.dropout if training else 0.0
        tile = _tile_of(x, tile)
        block = mlp_ops.MLP(self._norm, *self._products.of(x.dtype), self._kind, p, keep, answer, tile)
        if tile is not None:
            return self._products.run(mlp_tiles.TiledMLPBlock.apply, mlp_tiles.run, block, x, p)
        return self._products.run(mlp_ops.MLPBlock.apply, mlp_ops.run, block, x, p)


class _Products:
    """The two products of a block."""

    def __init__(
        self,
        name: str,
        bases: tuple[Base, Base],
        adapters: tuple[Adapters, Adapters],
        biases: Sequence[Tensor | None],
        sizes: tuple[list[int], list[int]],
        dropout: float,
    ) -> None:
        one, two = adapters
        self.name, self.bases = name, bases
        self.sizes, self.dropout = sizes, dropout
        self.every = [*one.a, *one.b, *two.a, *two.b]
        split = len(sizes[0])
        self.sides = (biases[:split], biases[split:])
        self.unbiased = tuple(Product(b, a.starts, a.scaling, None) for b, a in zip(bases, adapters, strict=True))

    def check(self, x: Tensor, keep: str, tile: int | None) -> None:
        """Raise if x or a setting does not fit."""
        _check_rows(self.name, x, self.bases, keep)
        if tile is not None and tile < 1:
            raise ValueError(f"{self.name}: tile={tile}; give a number of rows, at least 1, or None for all at once")

    def of(self, dtype: torch.dtype) -> tuple[Product, Product]:
        """Both for an input of this dtype, which the biases are added in."""
        first, second = map(_biased, self.unbiased, self.sides, self.sizes, (dtype, dtype))
        return first, second

    def run(
        self, recorded: Callable[..., Tensor], plain: Callable[..., Tensor], block: Any, x: Tensor, p: float
    ) -> Tensor:
        """The block's output, with a graph where something wants a gradient."""
        seed = draw_seed(x, p, 2) if self.every else None
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.every))
        return _untraced(recorded if wanted else plain, block, x, seed, *self.every)


def _tile_of(x: Tensor, tile: int | None) -> int | None:
    """The tile, where there are more rows than that."""
    return None if tile is None or x.numel() <= tile * x.shape[-1] else tile


def _kernels_of(attention: Callable[..., Tensor]) -> Callable[..., Direct | SharedDirect | None] | None:
    """From q, k and v to the kernels that a partial of packed_attention launches."""
    if not isinstance(attention, functools.partial) or attention.func is not packed_attention or attention.args:
        return None
    known = attention.keywords.keys() <= _OF_DIRECT_ATTENTION
    return functools.partial(direct_attention, **attention.keywords) if known else None


def _untraced(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call what torch.compile must not look into: it launches kernels itself, and one argument is a function."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def _check_rows(name: str, x: Tensor, bases: tuple[Base, Base], keep: str) -> None:
    first, _ = bases
    if keep not in _KEEP:
        raise ValueError(f"{name}: keep={keep!r}; allowed are {', '.join(map(repr, _KEEP))}")
    if x.dim() < 2 or (name == "attention_block" and x.dim() > 3) or x.shape[-1] != first.k:
        leading = "[S, {0}] or [B, S, {0}]" if name == "attention_block" else "[..., {0}]"
        raise ValueError(f"{name}: x has shape {list(x.shape)}; the weights need {leading.format(first.k)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x has dtype {x.dtype}; use a floating-point dtype")
    for base in bases:
        given = base.tensors[0]
        if not base.quantized and given.dtype != x.dtype:
            raise TypeError(
                f"{name}: x has dtype {x.dtype}, a weight {given.dtype}; use one dtype, that of the weights"
            )
        if given.device != x.device:
            raise ValueError(f"{name}: x is on {x.device}, a weight on {given.device}; use one device")


def _check_norm(name: str, what: str, norm: Norm | None, device: torch.device, width: int) -> None:
    if norm is None:
        return
    weight = norm.weight
    if not weight.is_floating_point():
        raise TypeError(f"{name}: {what} has a weight of dtype {weight.dtype}; use a floating-point dtype")
    if list(weight.shape) != [width] or weight.device != device:
        raise ValueError(
            f"{name}: {what} has a weight {list(weight.shape)} on {weight.device}; it needs [{width}] on {device}"
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
    bases: tuple[Base, Base],
    adapters: tuple[Adapters, Adapters],
    biases: Sequence[Tensor | None],
    dropout: float,
) -> None:
    first, second = bases
    if second.n != first.k:
        raise ValueError(f"{name}: the last weight has {second.n} outputs; x has {first.k}, to which they are added")
    for base, own in zip(bases, adapters, strict=True):
        given = base.tensors[0]
        x = torch.empty(0, base.k, dtype=torch.float32 if base.quantized else given.dtype, device=given.device)
        check_product(name, x, base, own, None, dropout)
    device = first.tensors[0].device
    if any(t.device != device for t in (second.tensors[0], *(shift for shift in biases if shift is not None))):
        raise ValueError(f"{name}: a weight or a bias is not on {device}, where the first weight is; use one device")


def _biased(product: Product, biases: Sequence[Tensor | None], sizes: Sequence[int], dtype: torch.dtype) -> Product:
    """The product with its biases as they are now, side by side.

    What is copied is copied at each call: the numbers may have changed since the last one, and a CUDA graph that has
    recorded a call must read them when it is replayed.
    """
    if all(shift is None for shift in biases):
        return product
    device = product.base.tensors[0].device
    parts = [
        torch.zeros(n, dtype=dtype, device=device) if t is None else t.detach().to(dtype)
        for t, n in zip(biases, sizes, strict=True)
    ]
    bias = torch.cat(parts) if len(parts) > 1 else parts[0]
    return Product(product.base, product.starts, product.scaling, bias)


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
    check_rope(q, k, cos, sin, None, layout, -2)
    pairs = rotated_pairs(head_dim, cos.shape[-1], rotary_dim)
    batches, length = (1, *x.shape[:-1])[-2:]
    first, second = (for_tokens("cos and sin", t.detach(), [], batches, length, 1)[..., :pairs] for t in (cos, sin))
    return first, second
