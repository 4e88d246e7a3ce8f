"""The most memory that halves of a layer of Llama 3.1 8B take at a time in tiles, in JSON. No tensor has any here.

A process of its own (see ``real_sizes``). Cases are ``half/form/keep/tokens/tile``, a tile of 0 being none; the half
``layer`` is both, computed again in backward from the layer's input alone. The attention is one that keeps q, k, v, its
output and a sum for each head, and makes no more than their gradients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from real_sizes import Live, believe
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import ft_kernels as ft

H, INNER, RANK, HEADS, KV_HEADS, D = 4096, 14336, 16, 32, 8, 128
SIZES = {"attention": [(HEADS * D, H), (KV_HEADS * D, H), (KV_HEADS * D, H), (H, HEADS * D)],
         "mlp": [(INNER, H), (INNER, H), (H, INNER)]}  # fmt: skip


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.empty(t.shape, dtype=t.dtype) for t in ctx.saved_tensors[:3])


def weight(form: str, n: int, k: int) -> Any:
    if form != "nf4":
        return torch.empty(n, k, dtype=torch.bfloat16)
    scales = ft.NestedScales(torch.empty(n * k // 64 // 256), torch.empty(256), torch.empty(()), 256)
    codes = torch.empty(n * k // 2, 1, dtype=torch.uint8)
    return ft.NF4Weight(codes, torch.empty(n * k // 64, dtype=torch.uint8), (n, k), 64, scales)


def made(half: str, form: str, tokens: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A half as a function of its input, and its adapters."""
    sizes = SIZES[half]
    weights = [weight(form, n, k) for n, k in sizes]
    first: Any = weights[:-1]
    second = weights[-1]
    if form != "nf4":
        first, second = ft.widen(first, RANK * len(first)), ft.widen(second, RANK)
    a = [torch.empty(RANK, k, requires_grad=True) for _, k in sizes]
    b = [torch.empty(n, RANK, requires_grad=True) for n, _ in sizes]
    norm = ft.Norm(torch.empty(H, dtype=torch.bfloat16), 1e-5)
    if half == "mlp":
        return ft.MLPBlock(norm, first, second, a, b), [*a, *b]
    block = ft.AttentionBlock(norm, first, second, a, b, heads=HEADS, kv_heads=KV_HEADS, head_dim=D)
    cos = torch.empty(tokens, D)

    def compute(x: Tensor, **settings: Any) -> Tensor:
        return block(x, cos=cos, sin=cos, attention=Attend.apply, **settings)  # type: ignore[no-untyped-call]

    return compute, [*a, *b]


def peaks(half: str, form: str, keep: Any, tokens: int, tile: int | None) -> list[int]:
    """Bytes of the forward and of the backward pass, beside weights, adapters, input and the gradient from above."""
    halves = [made(name, form, tokens) for name in (("attention", "mlp") if half == "layer" else (half,))]
    parameters = [t for _, adapters in halves for t in adapters]
    x = torch.empty(1, tokens, H, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty_like(x)
    live = Live()
    if half != "layer":
        compute = halves[0][0]
        with live:
            y = compute(x, keep=keep, tile=tile)
            forward, live.peak = live.peak, live.bytes
            torch.autograd.grad(y, [x, *parameters], dy)
        return [forward, live.peak]
    (attention, _), (mlp, _) = halves
    with live:
        with saved_tensors_hooks(lambda t: None, lambda t: t):
            y = mlp(attention(x, keep="inputs", tile=tile), keep="inputs", tile=tile).detach()
        forward = live.peak
        del y
        live.peak = live.bytes
        again = mlp(attention(x, keep=keep, tile=tile), keep=keep, tile=tile, answer=False)
        torch.autograd.grad(again, [x, *parameters], dy)
    return [forward, live.peak]


def main() -> None:
    believe()
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for case in sys.argv[1:]:
            half, form, keep, tokens, tile = case.split("/")
            settings = (half, form, keep, int(tokens), int(tile) or None)
            peaks(*settings)  # what is made once
            found[case] = peaks(*settings)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
