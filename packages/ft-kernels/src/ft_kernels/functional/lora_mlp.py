"""A gated multilayer perceptron with low-rank updates of its frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.functional.lora import joined_bias, lora_linear, lora_qkv
from ft_kernels.functional.lora_weights import BaseWeight, Part, base_of
from ft_kernels.ops.glu import reference as glu
from ft_kernels.ops.glu.autograd import glu_op
from ft_kernels.ops.lora.arguments import Adapters, check_product, draw_seed, numbers
from ft_kernels.ops.lora.operands import Base
from ft_kernels.ops.lora_mlp.autograd import lora_mlp_op

__all__ = ["Activation", "lora_mlp"]

Activation = Literal["silu", "gelu", "gelu_tanh"]


def lora_mlp(
    x: Tensor,
    gate_up: BaseWeight | Sequence[Part],
    down: BaseWeight,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    scaling: float | Sequence[float] = 1.0,
    activation: Activation = "silu",
    bias: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    magnitude: Sequence[Tensor | None] | None = None,
    training: bool = True,
) -> Tensor:
    """``down(activation(gate(x)) · up(x))``, each of the three a :func:`lora_linear`.

    GLU Variants Improve Transformer (Shazeer 2020, arXiv:2002.05202). Gate and up are one product, the activation
    writes into the next product's input, and backward keeps gate and up alone of what is ``[..., I]`` wide. It writes
    their gradients over them: a second backward through the same graph raises.

    Args:
        x: ``[..., K]``, as for :func:`lora_linear`.
        gate_up: gate's weight above up's, ``[2·I, K]``, in a form that :func:`lora_linear` takes, or both as a list.
        down: ``[N, I]``, likewise.
        a, b: gate's, up's and down's, each a tensor or None. Or two: one adapter of gate and up together (b
            ``[2·I, r]``), and down's.
        scaling: one number, or one for each adapter.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        bias: gate's, up's and down's, each one or None.
        dropout, training: as for :func:`lora_linear`.
        magnitude: for DoRA, one or None for each adapter.

    Returns:
        ``[..., N]`` in the weights' dtype; gradients as for :func:`lora_linear`. With a bias or a magnitude the parts
        are computed one after the other, and more is kept for backward.

    Raises:
        TypeError, ValueError: as :func:`lora_linear`.
    """
    name = "lora_mlp"
    if activation not in glu.KINDS:
        raise ValueError(f"{name}: activation={activation!r}; allowed are {', '.join(map(repr, glu.KINDS))}")
    count = len(a)
    if count not in (2, 3) or len(b) != count:
        raise ValueError(
            f"{name}: there are {count} a and {len(b)} b; give three of each (gate, up, down), or two (gate and up "
            "together, down)"
        )
    first, second = base_of(name, gate_up), base_of(name, down)
    width = first.n // 2
    if first.n != 2 * width or second.k != width:
        raise ValueError(f"{name}: gate_up has {first.n} outputs, down {second.k} inputs; gate_up needs twice as many")
    kind, factors = glu.KINDS.index(activation), numbers(name, scaling, count)
    for what, given, needed in (("bias", bias, 3), ("magnitude", magnitude, count)):
        if given is not None and len(given) != needed:
            raise ValueError(f"{name}: {what} has {len(given)} items; give {needed}, None where there is none")
    outputs = [width] * 2 if count == 3 else [2 * width]
    one = Adapters.some(name, a[:-1], b[:-1], outputs, factors[:-1])
    two = Adapters.some(name, a[-1:], b[-1:], [second.n], factors[-1:])
    if any(t is not None for t in (*(bias or ()), *(magnitude or ()))) or x.dtype == torch.float64:
        return _in_parts(x, gate_up, down, a, b, factors, kind, width, bias, dropout, magnitude, training)
    if not one.a and not two.a:
        return _in_parts(x, gate_up, down, a, b, factors, kind, width, bias, dropout, magnitude, training)
    x = check_product(name, x, first, one, None, dropout)
    hidden = x.new_empty(0, width)
    check_product(name, hidden, second, two, None, dropout)
    if {t.dtype for t in (*one.a, *two.a)} != {(one.a or two.a)[0].dtype}:
        raise TypeError(f"{name}: the adapters have several dtypes; use one for all")
    p = dropout if training else 0.0
    y: Tensor = lora_mlp_op(
        x, *_side(first, one), *_side(second, two), kind, p, draw_seed(x, p, 2)
    )[0]  # fmt: skip
    return y


def _side(base: Base, adapters: Adapters) -> tuple[object, ...]:
    form = (base.tensors, base.kind, base.k, base.sizes, base.meta)
    return (*form, adapters.a, adapters.b, adapters.starts, adapters.scaling)


def _in_parts(
    x: Tensor, gate_up: BaseWeight | Sequence[Part], down: BaseWeight, a: Sequence[Tensor | None],
    b: Sequence[Tensor | None], scaling: list[float], kind: int, width: int, bias: Sequence[Tensor | None] | None,
    dropout: float, magnitude: Sequence[Tensor | None] | None, training: bool,
) -> Tensor:  # fmt: skip
    biases = [None, None, None] if bias is None else list(bias)
    magnitudes = [None] * len(a) if magnitude is None else list(magnitude)
    sizes = [width] * 2 if len(a) == 3 else [2 * width]
    shift = joined_bias("lora_mlp", biases[:2], [width] * 2)
    parts = lora_qkv(
        x, gate_up, a[:-1], b[:-1], scaling=scaling[:-1], sizes=sizes, bias=shift, dropout=dropout,
        magnitude=magnitudes[:-1], training=training,
    )  # fmt: skip
    gate, up = parts if len(parts) == 2 else (parts[0], None)
    h: Tensor = (glu_op if use_triton(gate) else glu.glu)(gate, up, kind)
    if a[-1] is None or b[-1] is None:
        (y,) = lora_qkv(h, down, [None], [None], bias=biases[2], sizes=None if biases[2] is None else [len(biases[2])])
        return y
    return lora_linear(
        h, down, a[-1], b[-1], scaling=scaling[-1], bias=biases[2], dropout=dropout, magnitude=magnitudes[-1],
        training=training,
    )  # fmt: skip
