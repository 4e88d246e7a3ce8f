"""Linear products with low-rank updates in plain torch, term by term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["keep_mask", "lora_linear", "row_norms"]

_M = 0xFFFFFFFF


def keep_mask(seed: Tensor, rows: int, cols: int, stream: int, dropout: float, start: int = 0) -> Tensor:
    """What dropout keeps of ``[rows, cols]``, of which the first row has the number ``start``.

    Element (r, c) is kept where a 32-bit random number is ≥ dropout · 2³². It is word ``stream`` (0 to 3) of
    Philox-4x32-10 at counter (c, r, 0, 0) under the 64-bit key ``seed`` (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3"); the kernels compute the same.
    """
    word0 = torch.arange(cols, device=seed.device)
    word1 = torch.arange(start, start + rows, device=seed.device)[:, None]
    word2 = word3 = torch.zeros((), dtype=torch.int64, device=seed.device)
    key0, key1 = seed & _M, (seed >> 32) & _M
    for _ in range(10):
        first, second = 0xD2511F53 * word0, 0xCD9E8D57 * word2
        word0, word2 = ((second >> 32) & _M) ^ word1 ^ key0, ((first >> 32) & _M) ^ word3 ^ key1
        word1, word3 = second & _M, first & _M
        key0, key1 = (key0 + 0x9E3779B9) & _M, (key1 + 0xBB67AE85) & _M
    return (word0, word1, word2, word3)[stream].expand(rows, cols) >= round(dropout * 2**32)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    starts: Sequence[int],
    scaling: Sequence[float],
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``x Wᵀ + bias``, and for each adapter i ``scaling_i · dropout(x) A_iᵀ B_iᵀ`` added from column ``starts_i`` on.

    Differentiable by torch, twice too. Adapters are used in x's dtype.
    """
    y = F.linear(x, weight, bias)
    for i, (down, up) in enumerate(zip(a, b, strict=True)):
        source = x
        if dropout and seed is not None:
            keep = keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], i, dropout)
            source = torch.where(keep.view(x.shape), x / (1 - dropout), 0.0)
        update = F.linear(F.linear(source, down.to(x.dtype)), up.to(x.dtype)) * scaling[i]
        y = y + F.pad(update, (starts[i], y.shape[-1] - starts[i] - up.shape[0]))
    return y


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The Euclidean norm of each row of ``W + scaling · B A``, at least in fp32, some rows at a time."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    low = a.to(wide)
    rows = max(1, (1 << 24) // max(weight.shape[1], 1))  # 64 MiB of fp32
    parts = [
        torch.linalg.vector_norm(w.to(wide) + scaling * (u.to(wide) @ low), dim=1)
        for w, u in zip(weight.split(rows), b.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else weight.new_empty(0, dtype=wide)
