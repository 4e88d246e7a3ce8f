"""The gated multilayer perceptron with low-rank updates as a registered torch operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ft_kernels.ops.lora.autograd import as_rows, no_gradient, unflatten
from ft_kernels.ops.lora.operands import Base, Drop, Low, padded, width
from ft_kernels.ops.lora_mlp import products
from ft_kernels.ops.refusals import refuse_twice

__all__ = ["lora_mlp_backward_op", "lora_mlp_op"]

_SIDE = (
    "Tensor[] weight{0}, str kind{0}, int k{0}, int[] sizes{0}, int[] meta{0}, "
    "Tensor[] a{0}, Tensor[] b{0}, int[] starts{0}, float[] scaling{0}"
)
_SIDES = _SIDE.format(1) + ", " + _SIDE.format(2)
_SETTINGS = "int activation, float dropout, Tensor? seed"
_COUNT = 9  # arguments of a side


def _read(arguments: Sequence[Any]) -> tuple[Base, Low, Base, Low, int, Drop, Drop]:
    """The two products, the activation and the dropouts of their adapters' inputs."""
    one, two = arguments[:_COUNT], arguments[_COUNT : 2 * _COUNT]
    activation, dropout, seed = arguments[2 * _COUNT : 2 * _COUNT + 3]
    drops = [Drop(dropout, None if seed is None else seed[i : i + 1]) for i in range(2)]
    bases = [Base(side[1], side[0], *side[2:5]) for side in (one, two)]
    return bases[0], Low(*one[5:]), bases[1], Low(*two[5:]), activation, drops[0], drops[1]


@torch.library.custom_op(
    "ft_kernels::lora_mlp",
    mutates_args=(),
    schema=f"(Tensor x, {_SIDES}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def lora_mlp_op(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output ``[..., N]``, gate and up ``[M, 2·I]``, and what both products' adapters made of their inputs."""
    gate_up, first, down, second, activation, drop, drop_hidden = _read(arguments)
    with torch.autocast(x.device.type, enabled=False):
        y, both, tail, hidden_tail = products.forward(
            as_rows(x), gate_up, first, down, second, activation, drop, drop_hidden
        )
    return y.view(*x.shape[:-1], down.n), both, tail, hidden_tail


@lora_mlp_op.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    one, two = arguments[:_COUNT], arguments[_COUNT : 2 * _COUNT]
    tails = [x.new_empty(rows, padded(sum(t.shape[0] for t in side[5]))) for side in (one, two)]
    return x.new_empty(*x.shape[:-1], sum(two[3])), x.new_empty(rows, sum(one[3])), tails[0], tails[1]


@torch.library.custom_op(
    "ft_kernels::lora_mlp_backward",
    mutates_args={"gate_up"},
    schema=f"(Tensor dy, Tensor x, Tensor(a!) gate_up, Tensor tail, Tensor hidden_tail, {_SIDES}, {_SETTINGS}, "
    "bool need_x) -> (Tensor, Tensor)",
)
def lora_mlp_backward_op(
    dy: Tensor, x: Tensor, gate_up: Tensor, tail: Tensor, hidden_tail: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of x (rows of a wider buffer; empty if not needed) and all adapters' in one; writes over gate_up."""
    base, first, down, second, activation, drop, drop_hidden = _read(arguments)
    with torch.autocast(x.device.type, enabled=False):
        dx, flat = products.backward(
            as_rows(dy), as_rows(x), gate_up, tail, hidden_tail, base, first, down, second, activation,
            drop, drop_hidden, need_x=arguments[-1],
        )  # fmt: skip
    return x.new_empty(0) if dx is None else dx.view(*x.shape[:-1], base.k), flat


@lora_mlp_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, gate_up: Tensor, tail: Tensor, hidden_tail: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    base, first, _, second, *_ = _read(arguments)
    dx = x.new_empty(0)
    if arguments[-1]:
        dx = x.new_empty(*x.shape[:-1], width(base.k, first.r))[..., : base.k]
    some = [*first.a, *second.a, x][0]
    return dx, some.new_empty(first.numel + second.numel)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, *arguments = inputs
    a1, b1, a2, b2 = arguments[5], arguments[6], arguments[_COUNT + 5], arguments[_COUNT + 6]
    ctx.save_for_backward(x, *output[1:], arguments[-1], *a1, *b1, *a2, *b2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.counts = (len(a1), len(a2))
    # Frozen weights are no activations (see ops.lora.autograd), and the rest are numbers.
    ctx.arguments = [None if i % _COUNT in (5, 6) and i < 2 * _COUNT else v for i, v in enumerate(arguments[:-1])]


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Any, ...]:
    # Autograd itself would see that gate and up were written over, but not where hooks keep the saved tensors.
    refuse_twice(ctx, "lora_mlp")
    x, both, tail, hidden_tail, seed, *adapters = ctx.saved_tensors
    lists, place = [], 0
    for count in (ctx.counts[0], ctx.counts[0], ctx.counts[1], ctx.counts[1]):
        lists.append(adapters[place : place + count])
        place += count
    arguments = [*ctx.arguments, seed]
    arguments[5], arguments[6], arguments[_COUNT + 5], arguments[_COUNT + 6] = lists
    needs = ctx.needs_input_grad
    dx, flat = lora_mlp_backward_op(dy, x, both, tail, hidden_tail, *arguments, needs[0])
    sizes = [sum(t.numel() for t in (*a, *b)) for a, b in (lists[:2], lists[2:])]
    result: list[Any] = [dx if needs[0] else None]
    for side, (part, a, b) in enumerate(zip(flat.split(sizes), lists[::2], lists[1::2], strict=True)):
        own = arguments[side * _COUNT : (side + 1) * _COUNT]
        wants = needs[1 + side * _COUNT :]
        da, db = unflatten(part, a, b, wants[5], wants[6])
        result += [[None] * len(own[0]), None, None, no_gradient(own[3]), no_gradient(own[4]), da, db]
        result += [no_gradient(own[7]), no_gradient(own[8])]
    return *result, None, None, None


lora_mlp_op.register_autograd(_backward, setup_context=_setup_context)
