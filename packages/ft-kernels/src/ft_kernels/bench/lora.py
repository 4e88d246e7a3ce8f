"""The low-rank products of a decoder layer, beside the same products without a low-rank part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ft_kernels as ft
from ft_kernels.bench.harness import MODELS, Case, Model, Variants, frozen, leaf
from ft_kernels.functional import lora

__all__ = ["cases"]

TOKENS = 4096
RANK = 16
SCALING = 2.0


@dataclass(frozen=True)
class Linear:
    """Some projections of one input: how many outputs each has."""

    inputs: int
    sizes: tuple[int, ...]

    def weights(self) -> list[Tensor]:
        return [frozen(n, self.inputs).mul_(self.inputs**-0.5) for n in self.sizes]

    def adapters(self) -> list[Tensor]:
        """A and B of each projection."""
        return [t for n in self.sizes for t in (_small(RANK, self.inputs), _small(n, RANK))]

    @property
    def flop(self) -> int:
        return 2 * TOKENS * self.inputs * sum(self.sizes)


def _small(rows: int, columns: int) -> Tensor:
    return leaf(rows, columns).detach().mul_(columns**-0.5).requires_grad_()


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """Each operation by itself, and a layer's three together, at ``TOKENS`` rows."""
    for name in models:
        model = MODELS[name]
        h, kv = model.hidden, model.kv_heads * model.head_dim
        yield _products("lora_linear", name, Linear(h, (h,)))
        yield _products("lora_qkv", name, Linear(h, (model.heads * model.head_dim, kv, kv)))
        yield _layer(name, model)


def _ours(base: Any, x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
    if len(adapters) == 2:
        return (lora.lora_linear(x, base, *adapters, scaling=SCALING),)
    return lora.lora_qkv(x, base, adapters[::2], adapters[1::2], scaling=SCALING)


def _plain(weights: list[Tensor], x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
    """What PEFT computes."""
    return tuple(
        F.linear(x, w) + SCALING * F.linear(F.linear(x, a), b)
        for w, a, b in zip(weights, adapters[::2], adapters[1::2], strict=True)
    )


def _bare(weights: list[Tensor], whole: Tensor, x: Tensor) -> Sequence[Tensor]:
    """No low-rank part: one product, as ours."""
    parts: Sequence[Tensor] = F.linear(x, whole).split([w.shape[0] for w in weights], -1)
    return parts


def _products(op: str, name: str, linear: Linear) -> Case:
    def make() -> tuple[Any, ...]:
        weights = linear.weights()
        wide = lora.widen(weights, RANK * len(linear.sizes))
        return leaf(TOKENS, linear.inputs), *linear.adapters(), weights, torch.cat(weights), wide

    def with_base(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        return lambda x, *rest: function(rest[place], x, *rest[:-3])

    variants: Variants = {
        "ours": with_base(_ours, -1),
        "eager": with_base(_plain, -3),
        "floor": lambda x, *rest: _bare(rest[-3], rest[-2], x),
    }
    return Case(
        op, name, f"{TOKENS} x {linear.inputs} x {' + '.join(map(str, linear.sizes))}, rank {RANK}",
        make=make, variants=variants, flop={"forward": linear.flop, "backward": linear.flop},
    )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A decoder layer's products: q, k and v; o; gate and up; down."""

    parts: tuple[Linear, ...]

    @classmethod
    def of(cls, model: Model) -> Layer:
        h, wide = model.hidden, model.intermediate
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        return cls((Linear(h, (q, kv, kv)), Linear(q, (h,)), Linear(h, (wide, wide)), Linear(wide, (h,))))

    def run(
        self, product: Callable[..., Sequence[Tensor]], inputs: tuple[Tensor, ...], bases: Any, adapters: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """All of them, the activation between the last two too; the first three have inputs of their own."""
        given = iter(adapters)
        mine = [[next(given) for _ in range(2 * len(part.sizes))] for part in self.parts]
        first = [product(base, x, *own) for base, x, own in zip(bases[:3], inputs, mine[:3], strict=True)]
        gate, up = first.pop()
        return *first[0], *first[1], *product(bases[3], ft.swiglu(gate, up), *mine[3])


def _layer(name: str, model: Model) -> Case:
    layer = Layer.of(model)

    def make() -> tuple[Any, ...]:
        weights = [part.weights() for part in layer.parts]
        whole = [(own, torch.cat(own)) for own in weights]
        wide = [lora.widen(own, RANK * len(own)) for own in weights]
        inputs = [leaf(TOKENS, part.inputs) for part in layer.parts[:3]]
        return *inputs, *(t for part in layer.parts for t in part.adapters()), weights, whole, wide

    def running(product: Callable[..., Sequence[Tensor]], place: int) -> Callable[..., Any]:
        return lambda *given: layer.run(product, given[:3], given[place], list(given[3:-3]))

    flop = sum(part.flop for part in layer.parts)
    return Case(
        "lora_layer", name, f"{TOKENS} tokens, rank {RANK}",
        make=make,
        variants={
            "ours": running(_ours, -1),
            "eager": running(_plain, -3),
            "floor": running(lambda both, x, *_: _bare(both[0], both[1], x), -2),
        },
        flop={"forward": flop, "backward": flop},
    )  # fmt: skip
