"""Quantized weights and activations, at the weights of the models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ft_kernels as ft
from ft_kernels.bench import harness
from ft_kernels.bench.harness import BYTES, MODELS, Case, Variants, frozen, peer

__all__ = ["cases"]

ROOM = 64
"""Columns beside the weight in the rows that it is expanded into: they hold the low-rank part of a LoRA product."""


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """NF4 both ways, int8 and fp8."""
    for name in models:
        model = MODELS[name]
        for n, k in (
            (model.hidden, model.hidden),
            (model.intermediate, model.hidden),
            (model.hidden, model.intermediate),
        ):
            yield _nf4_dequantize(name, n, k)
        yield _nf4_quantize(name, model.intermediate, model.hidden)
        yield _int8_dequantize(name, model.intermediate, model.hidden)
        yield _fp8_quantize(name, tokens, model.hidden)


def _nf4_bytes(n: int, k: int) -> int:
    """Two values a byte, a byte for each 64 values' scale, and four for each 256 scales."""
    return n * k // 2 + n * k // 64 + 4 * (n * k // 64 // 256)


def _nf4_dequantize(name: str, n: int, k: int) -> Case:
    def make() -> tuple[Any, ...]:
        packed, absmax, nested = ft.nf4_quantize(frozen(n, k))
        wider = torch.zeros(n, k + ROOM, dtype=torch.bfloat16, device=harness.DEVICE)
        return packed, absmax, nested, wider[:, :k]

    def ours(packed: Tensor, absmax: Tensor, nested: Any, target: Tensor) -> Tensor:
        return ft.nf4_dequantize(packed, absmax, (n, k), torch.bfloat16, nested=nested, out=target)

    variants: Variants = {"ours": ours}
    bitsandbytes = peer("bitsandbytes.functional")
    if bitsandbytes is not None:
        # It has no wider rows to write to; its output is contiguous.
        def theirs(packed: Tensor, absmax: Tensor, nested: Any, target: Tensor) -> Tensor:
            second = bitsandbytes.QuantState(
                absmax=nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32
            )
            state = bitsandbytes.QuantState(
                absmax=absmax, shape=torch.Size((n, k)), dtype=torch.bfloat16, blocksize=64, quant_type="nf4",
                code=_code(bitsandbytes, packed.device), offset=nested.offset, state2=second,
            )  # fmt: skip
            values: Tensor = bitsandbytes.dequantize_4bit(packed, state)
            return values

        variants["bitsandbytes"] = theirs
    return Case(
        "nf4_dequantize", name, f"{n} x {k}, rows of {k + ROOM}",
        make=make,
        variants=variants,
        moved={"forward": _nf4_bytes(n, k) + n * k * BYTES},
        passes=("forward",),
    )  # fmt: skip


_codes: dict[Any, Tensor] = {}


def _code(bitsandbytes: Any, device: torch.device) -> Tensor:
    if device not in _codes:
        _codes[device] = bitsandbytes.get_4bit_type("nf4", device=device)
    return _codes[device]


def _nf4_quantize(name: str, n: int, k: int) -> Case:
    variants: Variants = {"ours": lambda weight: ft.nf4_quantize(weight)[:2]}
    bitsandbytes = peer("bitsandbytes.functional")
    if bitsandbytes is not None:

        def theirs(weight: Tensor) -> tuple[Tensor, Tensor]:
            packed, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            return packed, state.absmax

        variants["bitsandbytes"] = theirs
    return Case(
        "nf4_quantize", name, f"{n} x {k}",
        make=lambda: (frozen(n, k),),
        variants=variants,
        moved={"forward": _nf4_bytes(n, k) + n * k * BYTES},
        passes=("forward",),
    )  # fmt: skip


def _int8_dequantize(name: str, n: int, k: int) -> Case:
    def make() -> tuple[Tensor, ...]:
        return torch.randint(-127, 128, (n, k), dtype=torch.int8, device=harness.DEVICE), frozen(n).float().abs()

    variants: Variants = {
        "ours": lambda quantized, scales: ft.int8_dequantize(quantized, scales, torch.bfloat16),
        "eager": lambda quantized, scales: (quantized.float() * (scales / 127)[:, None]).bfloat16(),
    }
    bitsandbytes = peer("bitsandbytes.functional")
    if bitsandbytes is not None:
        # It gives fp32, twice the bytes; what its layers then do to get bf16 is part of the comparison.
        variants["bitsandbytes"] = lambda q, scales: bitsandbytes.int8_vectorwise_dequant(q, scales).bfloat16()
    return Case(
        "int8_dequantize", name, f"{n} x {k}",
        make=make,
        variants=variants,
        moved={"forward": n * k * (1 + BYTES) + 4 * n},
        passes=("forward",),
    )  # fmt: skip


def _fp8_quantize(name: str, tokens: int, h: int) -> Case:
    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp_min(2.0**-126)
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    return Case(
        "fp8_quantize", name, f"{tokens} x {h}, a scale for each row",
        make=lambda: (frozen(tokens, h),),
        variants={"ours": ft.fp8_quantize, "eager": eager},
        moved={"forward": tokens * h * (BYTES + 1) + 4 * tokens},
        passes=("forward",),
    )  # fmt: skip
