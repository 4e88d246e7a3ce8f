"""The halves of a decoder layer put together from the package's functions, under autograd: what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ft_kernels.functional.lora import lora_qkv
from ft_kernels.functional.lora_mlp import Activation, lora_mlp
from ft_kernels.functional.lora_weights import BaseWeight, Part
from ft_kernels.functional.norms import rms_norm
from ft_kernels.functional.rope import rope
from ft_kernels.ops.blocks.parts import Norm

__all__ = ["attention_block", "mlp_block"]


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else rms_norm(x, norm.weight, norm.eps, offset=norm.offset)


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
    scaling: Sequence[float],
    bias: Sequence[Tensor | None],
    q_norm: Norm | None,
    k_norm: Norm | None,
    dropout: float,
    training: bool,
    **rotary: Any,
) -> Tensor:
    """As :func:`ft_kernels.functional.attention_block`."""
    sizes = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    settings: dict[str, Any] = {"dropout": dropout, "training": training}
    parts = lora_qkv(
        _normed(x, norm), qkv, a[:3], b[:3], scaling=scaling[:3], sizes=sizes, bias=bias[:3], **settings
    )  # fmt: skip
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    q, k = _normed(q, q_norm), _normed(k, k_norm)
    if cos is not None and sin is not None:
        q, k = rope(q, k, cos, sin, **rotary)
    out = attention(q, k, v).flatten(-2)
    (y,) = lora_qkv(out, o, a[3:], b[3:], scaling=scaling[3:], sizes=[x.shape[-1]], bias=bias[3:], **settings)
    return x + y


def mlp_block(
    x: Tensor,
    norm: Norm,
    gate_up: BaseWeight | Sequence[Part],
    down: BaseWeight,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    activation: Activation,
    scaling: Sequence[float],
    bias: Sequence[Tensor | None],
    dropout: float,
    training: bool,
) -> Tensor:
    """As :func:`ft_kernels.functional.mlp_block`."""
    y = lora_mlp(
        _normed(x, norm), gate_up, down, a, b, activation=activation, scaling=scaling, bias=bias, dropout=dropout,
        training=training,
    )  # fmt: skip
    return x + y
