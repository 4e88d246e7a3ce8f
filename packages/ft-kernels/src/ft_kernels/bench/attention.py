"""Attention over packed documents: what is picked, beside all that could have been."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import ft_kernels as ft
from ft_kernels.bench.harness import MODELS, Case, Variants, leaf

__all__ = ["cases"]

LENGTHS = (512, 2048, 8192)
BACKENDS = ("dense", "flex", "flash", "flash_attn", "triton")


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """Causal attention with documents of one length, and with as many of half and of one and a half that length."""
    for name in models:
        model = MODELS[name]
        heads, kv_heads, d = model.heads, model.kv_heads, model.head_dim
        for length in LENGTHS:
            if tokens % (2 * length):
                continue
            for lengths, words in (
                ([length] * (tokens // length), f"documents of {length}"),
                (
                    [length // 2, length + length // 2] * (tokens // length // 2),
                    f"of {length // 2} and {length * 3 // 2}",
                ),
            ):
                yield Case(
                    "packed_attention", name, f"{tokens} x {heads}/{kv_heads} x {d}, {words}",
                    make=functools.partial(_arguments, tokens, heads, kv_heads, d, lengths),
                    variants=_variants(lengths),
                    flop={
                        "forward": 2 * heads * d * sum(n * n for n in lengths),
                        "backward": 5 * heads * d * sum(n * n for n in lengths),
                    },
                    compiled=False,
                    quick=len(set(lengths)) > 1 or length == 2048,
                )  # fmt: skip


def _arguments(tokens: int, heads: int, kv_heads: int, d: int, lengths: list[int]) -> tuple[object, ...]:
    return (
        leaf(tokens, heads, d),
        leaf(tokens, kv_heads, d),
        leaf(tokens, kv_heads, d),
        ft.plan_attention(lengths=lengths),
    )


def _variants(lengths: list[int]) -> Variants:
    variants: Variants = {
        "ours": lambda q, k, v, plan: ft.packed_attention(q, k, v, plan=plan),
        "eager": functools.partial(_by_document, lengths),
    }
    for backend in BACKENDS:
        if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            continue
        if backend == "dense" and len(set(lengths)) > 1:
            continue
        variants[backend] = functools.partial(_with, backend)
    return variants


def _with(backend: str, q: Tensor, k: Tensor, v: Tensor, plan: ft.AttentionPlan) -> Tensor:
    return ft.packed_attention(q, k, v, plan=plan, backend=backend)


def _by_document(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, _: object) -> Tensor:
    """What torch alone offers without a mask: a call for each document."""
    queries, keys, values = (x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v))
    out = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
        for a, b, c in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(out, 2)[0].transpose(0, 1)
