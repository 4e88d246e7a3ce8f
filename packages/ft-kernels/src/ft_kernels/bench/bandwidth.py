"""Operations that wait for memory: each input read once, each output written once, is all that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ft_kernels as ft
from ft_kernels.bench import harness
from ft_kernels.bench.harness import BYTES, MODELS, Case, Model, Variants, classes, leaf, peer

__all__ = ["cases"]


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """Norms, rope, gated activations and the cross-entropy of given logits."""
    for name in models:
        for make in (_rms_norm, _add_rms_norm, _layer_norm, _rope, _swiglu, _geglu, _geglu_exact, _cross_entropy):
            yield make(name, MODELS[name], tokens)


def _with_liger(variants: Variants, make: Callable[[Any], Callable[..., Any]]) -> Variants:
    liger = peer("liger_kernel.functional")
    return variants if liger is None else {**variants, "liger": make(liger)}


def _rms_norm(name: str, model: Model, tokens: int) -> Case:
    h, one = model.hidden, tokens * model.hidden * BYTES
    variants: Variants = {
        "ours": lambda x, w: ft.rms_norm(x, w, 1e-6),
        "eager": lambda x, w: F.rms_norm(x, (h,), w, 1e-6),
    }
    return Case(
        "rms_norm", name, f"{tokens} x {h}",
        make=lambda: (leaf(tokens, h), leaf(h)),
        variants=_with_liger(variants, lambda liger: lambda x, w: liger.rms_norm(x, w, 1e-6)),
        moved={"forward": 2 * one, "backward": 3 * one},
    )  # fmt: skip


def _add_rms_norm(name: str, model: Model, tokens: int) -> Case:
    h, one = model.hidden, tokens * model.hidden * BYTES

    def eager(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (h,), w, 1e-6), total

    variants: Variants = {"ours": lambda x, residual, w: ft.add_rms_norm(x, residual, w, 1e-6), "eager": eager}
    return Case(
        "add_rms_norm", name, f"{tokens} x {h}",
        make=lambda: (leaf(tokens, h), leaf(tokens, h), leaf(h)),
        variants=_with_liger(variants, lambda liger: lambda x, r, w: liger.fused_add_rms_norm(x, r, w, 1e-6)),
        moved={"forward": 4 * one, "backward": 4 * one},
    )  # fmt: skip


def _layer_norm(name: str, model: Model, tokens: int) -> Case:
    h, one = model.hidden, tokens * model.hidden * BYTES
    variants: Variants = {
        "ours": lambda x, w, b: ft.layer_norm(x, w, b, 1e-5),
        "eager": lambda x, w, b: F.layer_norm(x, (h,), w, b, 1e-5),
    }
    return Case(
        "layer_norm", name, f"{tokens} x {h}",
        make=lambda: (leaf(tokens, h), leaf(h), leaf(h)),
        variants=_with_liger(variants, lambda liger: lambda x, w, b: liger.layer_norm(x, w, b, 1e-5)),
        moved={"forward": 2 * one, "backward": 3 * one},
    )  # fmt: skip


def _rope(name: str, model: Model, tokens: int) -> Case:
    d, heads, kv_heads = model.head_dim, model.heads, model.kv_heads
    one = tokens * (heads + kv_heads) * d * BYTES

    def make() -> tuple[Tensor, ...]:
        angles = torch.arange(tokens)[:, None] * 500000.0 ** (-torch.arange(0, d, 2) / d)
        angles = torch.cat((angles, angles), -1)[None].to(harness.DEVICE)  # as transformers hands it to the layers
        return leaf(1, tokens, heads, d), leaf(1, tokens, kv_heads, d), angles.cos().bfloat16(), angles.sin().bfloat16()

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]

        return turn(q), turn(k)

    def with_liger(liger: Any) -> Callable[..., Any]:
        return lambda q, k, cos, sin: liger.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return Case(
        "rope", name, f"{tokens} x {heads}/{kv_heads} x {d}",
        make=make,
        variants=_with_liger({"ours": ft.rope, "eager": eager}, with_liger),
        moved=dict.fromkeys(("forward", "backward"), 2 * one + tokens * d * BYTES),
    )  # fmt: skip


def _gated(
    op: str, what: str, name: str, model: Model, tokens: int,
    ours: Callable[..., Any], eager: Callable[..., Any], liger: Callable[[Any], Callable[..., Any]] | None,
) -> Case:  # fmt: skip
    wide, one = model.intermediate, tokens * model.intermediate * BYTES
    variants: Variants = {"ours": ours, "eager": eager}
    return Case(
        op, name, f"{tokens} x {wide}{what}",
        make=lambda: (leaf(tokens, wide), leaf(tokens, wide)),
        variants=_with_liger(variants, liger) if liger else variants,
        moved={"forward": 3 * one, "backward": 5 * one},
        quick=what != ", exact",
    )  # fmt: skip


def _swiglu(name: str, model: Model, tokens: int) -> Case:
    return _gated(
        "swiglu", "", name, model, tokens, ft.swiglu, lambda gate, up: F.silu(gate) * up, lambda liger: liger.swiglu
    )


def _geglu(name: str, model: Model, tokens: int) -> Case:
    return _gated(
        "geglu", ", tanh", name, model, tokens,
        lambda gate, up: ft.geglu(gate, up, approximate="tanh"),
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        lambda liger: liger.geglu,
    )  # fmt: skip


def _geglu_exact(name: str, model: Model, tokens: int) -> Case:
    return _gated("geglu", ", exact", name, model, tokens, ft.geglu, lambda gate, up: F.gelu(gate) * up, None)


def _cross_entropy(name: str, model: Model, tokens: int) -> Case:
    v, one = model.vocabulary, tokens * model.vocabulary * BYTES
    variants: Variants = {
        "ours": ft.cross_entropy,
        "eager": lambda logits, targets: F.cross_entropy(logits.float(), targets),
    }
    return Case(
        "cross_entropy", name, f"{tokens} x {v}",
        make=lambda: (leaf(tokens, v), classes(v, tokens)),
        variants=_with_liger(variants, lambda liger: lambda logits, targets: liger.cross_entropy(logits, targets)[0]),
        moved={"forward": one, "backward": 2 * one},
        split=False,
    )  # fmt: skip
