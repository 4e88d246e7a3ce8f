"""Products with a weight in 8-bit floating point, the other side quantized row by row as it comes.

    Y = (Q_X · Q_Wᵀ) ⊙ (s_X s_Wᵀ)        with X ≈ s_X ⊙ Q_X and W ≈ s_W ⊙ Q_W, a scale for each row

FP8 Formats for Deep Learning (Micikevicius et al. 2022, arXiv:2209.05433). A card with fp8 matrix instructions
multiplies them as they are, through ``torch._scaled_mm``; elsewhere the same numbers are multiplied in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.ops.fp8 import reference
from ft_kernels.ops.lora.operands import Base

__all__ = ["forward", "input_gradient"]


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    if not dispatch.use_triton(x):
        return reference.quantize(x, 0)
    from ft_kernels.ops.fp8 import kernels

    codes = dispatch.allocate(x.shape, torch.float8_e4m3fn, x.device)
    scales = reference.scale_like(x, 0)
    kernels.quantize(x, 0, codes, scales)
    return codes, scales


def _product(x: Tensor, codes: Tensor, scales: Tensor, fast: bool) -> Tensor:
    """``X Wᵀ`` from W's codes ``[N, K]`` and scales ``[N, 1]``; `fast` sums in the tensor cores' own precision."""
    own, factors = _quantize(x)
    multiple = codes.shape[0] % 16 == 0 and codes.shape[1] % 16 == 0
    if tuning.capability(x.device) >= (8, 9) and x.dtype == torch.bfloat16 and multiple and len(x):
        y: Tensor = torch._scaled_mm(
            own, codes.t(), scale_a=factors, scale_b=scales.t(), out_dtype=x.dtype, use_fast_accum=fast
        )
        return y
    return (own.float() @ codes.float().t()).mul_(factors).mul_(scales.t()).to(x.dtype)


def forward(x: Tensor, base: Base, bias: Tensor | None) -> Tensor:
    """``X Wᵀ + bias``."""
    step = 4 if base.meta[0] else 2
    parts = [_product(x, base.tensors[i], base.tensors[i + 1], True) for i in range(0, len(base.tensors), step)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return y if bias is None else y.add_(bias)


def input_gradient(dy: Tensor, base: Base, dx: Tensor) -> bool:
    """``dY W`` into ``dx`` from the codes of Wᵀ, if the weight has them."""
    if not base.meta[0]:
        return False
    for i, part in enumerate(dy.split(list(base.sizes), 1)):
        product = _product(part, base.tensors[4 * i + 2], base.tensors[4 * i + 3], False)
        dx.copy_(product) if i == 0 else dx.add_(product)
    return True
