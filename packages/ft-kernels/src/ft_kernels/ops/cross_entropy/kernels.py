"""Cross-entropy in Triton: one reading of the logits forward, one reading and one writing backward.

For one row with logits x, z = softcap·tanh(logit_scale·x / softcap) and target t, the forward pass keeps a running
maximum m and a running sum R = Σ_{j≠t} exp(z_j − m) (Milakov and Gimelshein 2018, arXiv:1805.02867). Leaving the target
out of the sum avoids the cancellation that spoils confident rows: with S = R + exp(z_t − m),

    −log p_t = (m − z_t) + log1p(S − 1)        1 − p_t = R / S        lse = m + log S

loss = (1−α)(−log p_t) + α(lse − mean z) + ζ·lse², and its gradient with respect to z_j is
p_j(1 + 2ζ·lse) − (1−α)[j = t] − α/V.

16-bit logits are computed in fp32. fp32 logits are computed in fp64, with an exponential made for the purpose.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.dispatch import Rows, launch

__all__ = ["backward", "forward", "wide_dtype"]

MAX_BLOCK = 4096


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of per-row results for logits like these."""
    return torch.float64 if logits.dtype == torch.float32 else torch.float32


@triton.jit
def _capped(x, softcap: tl.constexpr, scale: tl.constexpr):
    """softcap·tanh(scale·x / softcap); without a cap, scale·x."""
    if scale != 1.0:
        x = x * scale
    if softcap != 0.0:
        # tanh|a| = (1 − e)/(1 + e) with e = exp(−2|a|), which cannot overflow.
        e = tl.exp(tl.abs(x) * (-2.0 / softcap))
        x = softcap * tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    return x


@triton.jit
def _capped_slope(x, softcap: tl.constexpr, scale: tl.constexpr):
    """dz/dx of ``_capped``: scale·(1 − tanh²) = scale·4e/(1 + e)², which does not cancel near the cap."""
    e = tl.exp(tl.abs(x * scale) * (-2.0 / softcap))
    return scale * 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _exp(d, WIDE: tl.constexpr):
    """exp of d ≤ 0. In fp64 it is right to about 1e-8, a sixth of fp32's rounding, for a third of a full exp's cost:

    d = n·ln 2 + f with |f| ≤ 0.35, and exp f = 1 + f + f²·q(f), whose last and small part is computed in fp32. An fp32
    exp, with its error of an ulp or two, would be the largest error of all.
    """
    if tl.float64 == WIDE:
        near = tl.where(d < -200.0, -200.0, d)
        n = tl.floor(near.to(tl.float32) * 1.44269504 + 0.5)
        f = near - n.to(tl.float64) * 0.6931471805599453
        h = f.to(tl.float32)
        q = h * (1.0 / 40320) + 1.0 / 5040
        q = h * q + 1.0 / 720
        q = h * q + 1.0 / 120
        q = h * q + 1.0 / 24
        q = h * q + 1.0 / 6
        q = h * q + 0.5
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)  # 2 to the n, by its bits
        e = tl.where(d < -200.0, 0.0, ((h * h * q).to(tl.float64) + f + 1.0) * power)
    else:
        e = tl.exp(d)
    return e


@triton.jit
def _log1p(v):
    # Kahan's: the rounding of 1 + v is undone by dividing by what was really added.
    u = 1.0 + v
    return tl.where(u == 1.0, v, tl.log(u) * v / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _forward(
    logits, inner, outer_stride, inner_stride, targets, losses, lses, rests, V, ignore_index,
    smoothing: tl.constexpr, softcap: tl.constexpr, scale: tl.constexpr, z_loss: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(lses + row, 0.0)
        tl.store(rests + row, 0.0)
        return
    source = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    valid = (target >= 0) & (target < V)
    picked = _capped(tl.load(source + tl.where(valid, target, 0)).to(WIDE), softcap, scale)
    picked = tl.where(valid, picked, float("nan"))  # a target outside the vocabulary: loud, and no stray read
    maximum = picked
    others = tl.full((), 0.0, WIDE)
    total = tl.full((), 0.0, WIDE)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        there = cols < V
        z = _capped(tl.load(source + cols, mask=there, other=0.0).to(WIDE), softcap, scale)
        if smoothing != 0.0:
            total += tl.sum(tl.where(there, z, 0.0), 0)
        z = tl.where(there & (cols != target), z, float("-inf"))
        higher = tl.maximum(maximum, tl.max(z, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        others = others * tl.exp(maximum - shift) + tl.sum(_exp(z - shift, WIDE), 0)
        maximum = higher
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    own = tl.exp(picked - shift)
    total_exp = others + own
    lse = shift + tl.log(total_exp)
    loss = (shift - picked) + _log1p(others + (own - 1.0))
    if smoothing != 0.0:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - total / V)
    if z_loss != 0.0:
        loss += z_loss * lse * lse
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)
    tl.store(rests + row, others / total_exp)


@triton.jit
def _backward(
    grads, logits, inner, outer_stride, inner_stride, targets, lses, rests, out, V, ignore_index,
    smoothing: tl.constexpr, softcap: tl.constexpr, scale: tl.constexpr, z_loss: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = cols < V
    result = out + row * V + cols
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(result, tl.zeros((BLOCK,), out.dtype.element_ty), mask=there)
        return
    source = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    grad = tl.load(grads + row)
    lse = tl.load(lses + row)
    rest = tl.load(rests + row)
    x = tl.load(source + cols, mask=there, other=0.0).to(WIDE)
    z = _capped(x, softcap, scale)
    p = _exp(z - lse, WIDE)
    dz = tl.where(cols == target, -rest, p)
    if z_loss != 0.0:
        dz += 2.0 * z_loss * lse * tl.where(cols == target, 1.0 - rest, p)
    if smoothing != 0.0:
        share = 1.0 / tl.cast(V, WIDE)
        dz += smoothing * (tl.where(cols == target, 1.0, 0.0) - share)
    if softcap != 0.0:
        dz *= _capped_slope(x, softcap, scale)
    elif scale != 1.0:
        dz *= scale
    tl.store(result, (dz * grad).to(out.dtype.element_ty), mask=there)


def _settings(logits: Tensor, vocabulary: int) -> dict[str, Any]:
    wide = wide_dtype(logits)
    block = min(triton.next_power_of_2(vocabulary), MAX_BLOCK)
    return {
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        "BLOCK": block,
        "num_warps": min(8, max(1, block // 256)),
    }


def forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, logsumexp and 1 − p(target), in ``wide_dtype``."""
    rows, vocabulary = Rows(logits), logits.shape[-1]
    results = [dispatch.allocate(targets.shape, wide_dtype(logits), logits.device) for _ in range(3)]
    if logits.numel():
        launch(
            "cross_entropy_forward", _forward, (rows.count,), logits.device,
            rows.tensor, *rows.layout, targets.contiguous(), *results, vocabulary, ignore_index,
            smoothing=label_smoothing, softcap=softcap, scale=logit_scale, z_loss=z_loss,
            **_settings(logits, vocabulary),
        )  # fmt: skip
    return results[0], results[1], results[2]


def backward(
    grads: Tensor,
    logits: Tensor,
    targets: Tensor,
    lses: Tensor,
    rests: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> Tensor:
    """The gradient of the logits (contiguous, their dtype) from the gradient of each row's loss."""
    rows, vocabulary = Rows(logits), logits.shape[-1]
    out = dispatch.allocate(logits.shape, logits.dtype, logits.device)
    if out.numel():
        settings = _settings(logits, vocabulary)
        grid = (rows.count, triton.cdiv(vocabulary, settings["BLOCK"]))
        launch(
            "cross_entropy_backward", _backward, grid, logits.device,
            grads.contiguous(), rows.tensor, *rows.layout, targets.contiguous(), lses, rests, out,
            vocabulary, ignore_index,
            smoothing=label_smoothing, softcap=softcap, scale=logit_scale, z_loss=z_loss, **settings,
        )  # fmt: skip
    return out
