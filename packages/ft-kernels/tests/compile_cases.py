"""One small call of every operation, forward and backward, at the widths of real models.

``compile_targets.py`` compiles the kernels that these calls launch for cards that are not there; ``sanitize.py`` runs
them on the one that is. Rows are few (a multiple of 16, as in training: Triton compiles other code for odd numbers),
widths are those that decide tile sizes. Every ``@triton.jit`` function that is launched must be reached by a case.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ft_kernels as ft
from ft_kernels.functional.lora import lora_linear, lora_qkv, widen
from ft_kernels.functional.lora_mlp import lora_mlp
from ft_kernels.functional.quantization import Fp8Scaling

H, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256  # Llama 3.1 8B's
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROWS = 16


@dataclass(frozen=True)
class Make:
    """Makes a case's tensors."""

    dtype: torch.dtype
    device: str

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers that want a gradient."""
        return torch.randn(shape, dtype=self.dtype, device=self.device).requires_grad_()

    def frozen(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, device=self.device)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])


def rms_norm(make: Make) -> None:
    backward(ft.rms_norm(make(ROWS, H), make(H)))
    backward(ft.rms_norm(make(ROWS, 128), make(128), offset=1.0))  # the norm of a head
    backward(ft.rms_norm(make(ROWS, H), make.frozen(H)))
    total, normed = ft.add_rms_norm(make(ROWS, H), make(ROWS, H), make(H))
    backward(total, normed)


def layer_norm(make: Make) -> None:
    backward(ft.layer_norm(make(ROWS, H), make(H), make(H)))
    backward(ft.layer_norm(make(ROWS, 64), make(64), make(64)))


def rope(make: Make) -> None:
    q, k = make(1, ROWS, HEADS, HEAD_DIM), make(1, ROWS, KV_HEADS, HEAD_DIM)
    cos, sin = make.frozen(ROWS, HEAD_DIM), make.frozen(ROWS, HEAD_DIM)
    backward(*ft.rope(q, k, cos, sin))
    backward(*ft.rope(q, k, cos, sin, position_ids=make.classes(ROWS, ROWS)))
    backward(*ft.rope(q, k, cos[:, :32], sin[:, :32], rotary_dim=64, layout="interleaved"))
    ft.rope(q.detach().clone(), k.detach().clone(), cos, sin, inplace=True)


def glu(make: Make) -> None:
    backward(ft.swiglu(make(ROWS, INTERMEDIATE), make(ROWS, INTERMEDIATE)))
    backward(ft.swiglu(make(ROWS, 2 * INTERMEDIATE)))
    for approximate in ("none", "tanh"):
        backward(ft.geglu(make(ROWS, INTERMEDIATE), make(ROWS, INTERMEDIATE), approximate=approximate))


def cross_entropy(make: Make) -> None:
    targets = make.classes(VOCABULARY, ROWS)
    backward(ft.cross_entropy(make(ROWS, VOCABULARY), targets))
    backward(ft.cross_entropy(make(ROWS, VOCABULARY), targets, softcap=30.0, label_smoothing=0.1, z_loss=1e-4))


def packed_attention(make: Make) -> None:
    if make.dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 0):
        return  # is not computed by the kernel

    def heads(count: int, d: int) -> Tensor:
        return make(2 * ROWS, count, d)

    documents = {"lengths": [ROWS - 3, ROWS + 3], "backend": "triton"}
    backward(ft.packed_attention(heads(4, 128), heads(2, 128), heads(2, 128), **documents))
    backward(ft.packed_attention(heads(4, 128), heads(2, 128), heads(2, 128), exact=True, **documents))
    backward(ft.packed_attention(heads(4, 256), heads(2, 256), heads(2, 256), softcap=50.0, **documents))
    shared = ft.plan_attention(branches=[[ROWS, 3, ROWS - 3]])
    backward(ft.packed_attention(heads(4, 128), heads(2, 128), heads(2, 128), plan=shared, backend="triton"))
    sinks = make(4)
    backward(ft.packed_attention(heads(4, 64), heads(2, 64), heads(2, 64), sinks=sinks, window=8, **documents))


def linear_heads(make: Make) -> None:
    """The kernels take the logits' width in blocks, so a smaller head than a model's does for them."""
    rows, h, v = 64, 256, 8192
    targets = make.classes(v, rows)
    backward(ft.linear_cross_entropy(make(rows, h), make.frozen(v, h), targets))
    backward(ft.linear_cross_entropy(make(rows, h), make(v, h), targets, bias=make(v), softcap=30.0))
    update = (make(8, h), make(v, 8), 2.0)
    backward(ft.linear_cross_entropy(make(rows, h), make.frozen(v, h), targets, lora=update, reduction="none"))
    backward(ft.linear_logprob(make(rows, h), make.frozen(v, h), targets))
    result = ft.linear_logprob(make(rows, h), make(v, h), targets, entropy=True, top1=True)
    backward(result.logprobs, result.entropy)


def nf4(make: Make) -> None:
    n, k = 64, H
    for blocksize, nested in ((64, True), (64, False), (4096, True)):
        packed, absmax, second = ft.nf4_quantize(make.frozen(n, k), blocksize, nested=nested)
        ft.nf4_dequantize(packed, absmax, (n, k), make.dtype, blocksize, nested=second)
    packed, absmax, second = ft.nf4_quantize(make.frozen(n, k))
    ft.nf4_dequantize(packed, absmax, (n, k), make.dtype, nested=second, out=make.frozen(n, k + 64)[:, :k])
    packed, absmax, second = ft.nf4_quantize(make.frozen(3, 33))
    ft.nf4_dequantize(packed, absmax, (3, 33), make.dtype, nested=second)


def int8(make: Make) -> None:
    quantized = make.classes(256, 64, H).sub_(128).to(torch.int8)
    scales = make.frozen(64).float().abs()
    ft.int8_dequantize(quantized, scales, make.dtype)
    ft.int8_dequantize(quantized, scales, make.dtype, out=make.frozen(64, H + 64)[:, :H])


def fp8(make: Make) -> None:
    for scaling in typing.get_args(Fp8Scaling):
        ft.fp8_quantize(make.frozen(128, H), scaling)


def lora(make: Make) -> None:
    """Rows from which products are widened; adapters in fp32, as PEFT has them."""
    if make.dtype == torch.float32:
        return  # torch's products alone
    full = Make(torch.float32, make.device)
    rows, k, sizes = 128, 1024, (1024, 256, 256)

    def adapters(rank: int, *outputs: int) -> tuple[list[Tensor], list[Tensor]]:
        return [full(rank, k) for _ in outputs], [full(n, rank) for n in outputs]

    wide = widen([make.frozen(n, k) for n in sizes], 3 * 20)
    for rank, dropout in ((16, 0.0), (16, 0.1), (20, 0.0)):
        a, b = adapters(rank, *sizes)
        backward(*lora_qkv(make(rows, k), wide, a, b, dropout=dropout))
    wide = widen(make.frozen(1024, k), 128)
    for rank in (16, 128):
        a, b = adapters(rank, 1024)
        backward(lora_linear(make(rows, k), wide, a, b))
    a, b = adapters(16, 1024)
    backward(lora_linear(make(rows, k), wide, a, b, magnitude=full(1024)))


def mlp(make: Make) -> None:
    """Rows from which the activation makes the low-rank products beside it."""
    if make.dtype == torch.float32:
        return  # torch's products, and the activation of ``glu``
    full = Make(torch.float32, make.device)
    rows, k, wide = 1024, 256, 512
    gate_up, down = widen([make.frozen(wide, k) for _ in range(2)], 128), widen(make.frozen(k, wide), 64)
    for rank, dropout, activation in ((16, 0.0, "silu"), (16, 0.1, "gelu"), (64, 0.0, "silu")):
        a = [full(rank, k), full(rank, k), full(rank, wide)]
        b = [full(wide, rank), full(wide, rank), full(k, rank)]
        backward(lora_mlp(make(rows, k), gate_up, down, a, b, dropout=dropout, activation=activation))


def blocks(make: Make) -> None:
    """What a layer's halves need beyond their parts' kernels: gradients from rows that are normed as they are read."""
    if make.dtype == torch.float32:
        return  # torch's products
    full = Make(torch.float32, make.device)
    rows, k, wide, heads, d = 128, 1024, 512, 8, 128

    def adapters(rank: int, *sizes: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
        return [full(rank, inputs) for _, inputs in sizes], [full(n, rank) for n, _ in sizes]

    norm, head_norm = ft.Norm(make.frozen(k), 1e-5), ft.Norm(make.frozen(d), 1e-5)
    widths = (heads * d, 2 * d, 2 * d)
    qkv, o = widen([make.frozen(n, k) for n in widths], 3 * 20), widen(make.frozen(k, k), 20)
    turns = {"cos": make.frozen(rows, d), "sin": make.frozen(rows, d)}
    for rank, dropout in ((16, 0.0), (16, 0.1), (20, 0.0)):
        backward(
            ft.attention_block(
                make(1, rows, k), norm, qkv, o, *adapters(rank, *((n, k) for n in widths), (k, k)), heads=heads,
                kv_heads=2, head_dim=d, **turns, attention=lambda q, k, v: q + k.repeat(1, 1, 4, 1), q_norm=head_norm,
                k_norm=head_norm, dropout=dropout,
            )
        )  # fmt: skip
    gate_up, down = widen([make.frozen(wide, k) for _ in range(2)], 32), widen(make.frozen(k, wide), 16)
    sizes = ((wide, k), (wide, k), (k, wide))
    backward(ft.mlp_block(make(rows, k), norm, gate_up, down, *adapters(16, *sizes)))


def few_rows(make: Make) -> None:
    if make.dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 0):
        return  # torch's products
    for k, sizes, nested in ((H, (H, 1024, 1024), True), (INTERMEDIATE, (256,), True), (1024, (256, 256), False)):
        weights = [ft.NF4Weight.quantize(make.frozen(n, k), nested=nested) for n in sizes]
        for rows in (1, 16, 32, 128):
            ft.nf4_linear(make.frozen(rows, k), weights)
        ft.row_linear(make.frozen(1, k), [make.frozen(n, k) for n in sizes])
    for heads, kv_heads, d, rows in ((HEADS, KV_HEADS, HEAD_DIM, 1), (HEADS, KV_HEADS, HEAD_DIM, 16), (14, 2, 64, 1)):
        kept = [make.frozen(rows, 1024, kv_heads, d) for _ in range(2)]
        lengths = torch.full((rows,), 1000, dtype=torch.int32, device=make.device)
        tables = make.frozen(1024, d), make.frozen(1024, d)
        ft.rope_append(
            make.frozen(rows, heads, d), make.frozen(rows, kv_heads, d), make.frozen(rows, kv_heads, d), *kept,
            lengths - 1, *tables,
        )  # fmt: skip
        ft.decode_attention(make.frozen(rows, heads, d), *kept, lengths)
        ft.decode_attention(make.frozen(rows, heads, d), *kept, lengths, window=100)


CASES: list[Callable[[Make], None]] = [
    rms_norm, layer_norm, rope, glu, cross_entropy, linear_heads, nf4, int8, fp8, lora, mlp, blocks,
    packed_attention, few_rows,
]  # fmt: skip
