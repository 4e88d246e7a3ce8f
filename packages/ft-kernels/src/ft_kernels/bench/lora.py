"""The low-rank products of a decoder layer, beside the same products without a low-rank part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ft_kernels as ft
from ft_kernels.bench.harness import MODELS, Case, Model, frozen, leaf
from ft_kernels.functional.lora import lora_linear, lora_qkv, widen
from ft_kernels.functional.lora_mlp import lora_mlp
from ft_kernels.functional.lora_weights import NF4Weight

__all__ = ["cases"]

TOKENS = 4096
RANK = 16
SCALING = 2.0

Product = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Linear:
    """Projections of one input, with the outputs of each."""

    inputs: int
    sizes: tuple[int, ...]

    def weights(self, quantized: bool = False) -> Weights:
        parts = [frozen(n, self.inputs).mul_(self.inputs**-0.5) for n in self.sizes]
        if not quantized:
            return Weights(parts, torch.cat(parts), widen(parts, RANK * len(parts)))
        ours = [NF4Weight.quantize(part) for part in parts]
        parts = [_numbers(weight, torch.empty_like(part)) for weight, part in zip(ours, parts, strict=True)]
        return Weights(parts, torch.cat(parts), ours)

    def adapters(self, dtype: torch.dtype) -> list[Tensor]:
        """A and B of each projection, one after the other."""
        shapes = [shape for n in self.sizes for shape in ((RANK, self.inputs), (n, RANK))]
        return [frozen(*shape).mul_(shape[1] ** -0.5).to(dtype).requires_grad_() for shape in shapes]

    @property
    def flop(self) -> int:
        return 2 * TOKENS * self.inputs * sum(self.sizes)


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a :class:`Linear`, as each variant wants them."""

    parts: list[Tensor]
    whole: Tensor
    ours: Any


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """Each operation by itself, and a layer's three together, at ``TOKENS`` rows."""
    for name in models:
        model = MODELS[name]
        h, kv = model.hidden, model.kv_heads * model.head_dim
        yield _products("lora_linear", name, Linear(h, (h,)))
        yield _products("lora_qkv", name, Linear(h, (model.heads * model.head_dim, kv, kv)))
        yield _layer("lora_layer", name, model, torch.bfloat16)
        yield _layer("lora_layer_fp32_adapters", name, model, torch.float32)
        yield _layer("lora_layer_nf4", name, model, torch.bfloat16, quantized=True)


def _ours(w: Weights, x: Tensor, *adapters: Tensor) -> Sequence[Tensor]:
    if len(adapters) == 2:
        weight = w.ours[0] if isinstance(w.ours, list) else w.ours
        return (lora_linear(x, weight, *adapters, scaling=SCALING),)
    return lora_qkv(x, w.ours, adapters[::2], adapters[1::2], scaling=SCALING)


def _plain(w: Weights, x: Tensor, *adapters: Tensor) -> Sequence[Tensor]:
    """What PEFT computes under autocast."""
    low = [adapter.to(x.dtype) for adapter in adapters]
    return [
        F.linear(x, part) + SCALING * F.linear(F.linear(x, a), b)
        for part, a, b in zip(w.parts, low[::2], low[1::2], strict=True)
    ]


def _bare(w: Weights, x: Tensor, *_: Tensor) -> Sequence[Tensor]:
    """No low-rank part, and one product, as ours."""
    parts: Sequence[Tensor] = F.linear(x, w.whole).split([part.shape[0] for part in w.parts], -1)
    return parts


def _products(op: str, name: str, linear: Linear) -> Case:
    return Case(
        op, name, f"{TOKENS} x {linear.inputs} x {' + '.join(map(str, linear.sizes))}, rank {RANK}",
        make=lambda: (linear.weights(), leaf(TOKENS, linear.inputs), *linear.adapters(torch.bfloat16)),
        variants={"ours": _ours, "eager": _plain, "floor": _bare},
        flop={"forward": linear.flop, "backward": linear.flop},
    )  # fmt: skip


def _mlp_ours(gate_up: Weights, down: Weights, x: Tensor, *adapters: Tensor) -> Tensor:
    last = down.ours[0] if isinstance(down.ours, list) else down.ours
    return lora_mlp(x, gate_up.ours, last, adapters[::2], adapters[1::2], scaling=SCALING)


def _mlp_plain(gate_up: Weights, down: Weights, x: Tensor, *adapters: Tensor) -> Tensor:
    gate, up = _plain(gate_up, x, *adapters[:4])
    return _plain(down, F.silu(gate) * up, *adapters[4:])[0]


def _mlp_bare(gate_up: Weights, down: Weights, x: Tensor, *_: Tensor) -> Tensor:
    """With our own activation, which is none of the low-rank part's cost."""
    return F.linear(ft.swiglu(F.linear(x, gate_up.whole)), down.whole)


class _Expand(torch.autograd.Function):
    """Every quantized weight expanded once in forward and once in backward, as the products need them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Sequence[Weights]) -> Tensor:
        ctx.weights = weights
        _expand(weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override, unused-ignore]
        _expand(ctx.weights)
        return grad, None


def _expand(weights: Sequence[Weights]) -> None:
    for weight in weights:
        rows, columns = weight.whole.shape
        wide = torch.empty(rows, columns + 64, dtype=weight.whole.dtype, device=weight.whole.device)
        for part, target in zip(weight.ours, wide[:, :columns].split([len(p) for p in weight.parts]), strict=True):
            _numbers(part, target)


def _numbers(weight: NF4Weight, out: Tensor) -> Tensor:
    return ft.nf4_dequantize(
        weight.packed, weight.absmax, weight.shape, out.dtype, weight.blocksize, nested=weight.nested, out=out
    )


def _layer(op: str, name: str, model: Model, dtype: torch.dtype, *, quantized: bool = False) -> Case:
    """q, k and v; o; gate, up and down. The inputs of the first two and of the third are their own."""
    h, wide = model.hidden, model.intermediate
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    linears = [Linear(h, (q, kv, kv)), Linear(q, (h,)), Linear(h, (wide, wide)), Linear(wide, (h,))]

    def make() -> tuple[Any, ...]:
        inputs = [leaf(TOKENS, linear.inputs) for linear in linears[:3]]
        weights = [linear.weights(quantized) for linear in linears]
        return *weights, *inputs, *(t for linear in linears for t in linear.adapters(dtype))

    def layer(product: Product, mlp: Callable[..., Tensor]) -> Callable[..., Sequence[Tensor]]:
        def run(qkv: Weights, o: Weights, gate_up: Weights, down: Weights, *given: Tensor) -> Sequence[Tensor]:
            x, attended, y, *adapters = given
            first = (*product(qkv, x, *adapters[:6]), *product(o, attended, *adapters[6:8]))
            return *first, mlp(gate_up, down, y, *adapters[8:])

        return run

    def expansions(*given: Any) -> Tensor:
        expanded: Tensor = _Expand.apply(given[len(linears)], given[: len(linears)])  # type: ignore[no-untyped-call]
        return expanded

    flop = sum(linear.flop for linear in linears)
    return Case(
        op, name, f"{TOKENS} tokens, rank {RANK}",
        make=make,
        variants={
            "ours": layer(_ours, _mlp_ours),
            "eager": layer(_plain, _mlp_plain),
            "floor": layer(_bare, _mlp_bare),
            **({"left out": expansions} if quantized else {}),
        },
        flop={"forward": flop, "backward": flop},
        quick=dtype == torch.bfloat16,
    )  # fmt: skip
