"""Cross-entropy in Triton: one reading of the logits forward, one reading and one writing backward.

For one row with logits x, z = softcap·tanh(logit_scale·x / softcap) / temperature and target t, the forward pass keeps
a running maximum m and a running sum R = Σ_{j≠t} exp(z_j − m) (Milakov and Gimelshein 2018, arXiv:1805.02867). Leaving
the target out of the sum avoids the cancellation that spoils confident rows: with D = m − z_t,

    −log p_t = log1p(R·exp(D))  for D ≤ 0,   D + log(R + exp(−D))  for D > 0
    1 − p_t = R·exp(D) / (1 + R·exp(D))      lse = z_t − log p_t

loss = (1−α)(−log p_t) + α(lse − mean z) + ζ·lse², and its gradient with respect to z_j is
p_j(1 + 2ζ·lse) − (1−α)[j = t] − α/V. The entropy H = lse − Σ p·z has the gradient −p_j(log p_j + H).

A program reads a row in tiles ``[UNROLL, LANES, PACK]``: PACK elements are one 16-byte load of one thread, and each
lane (thread) keeps a maximum and a sum of its own, so that nothing crosses threads before the row's end. The tile with
the target is read last, with a mask, as is the one that the row doesn't fill; all others need no mask.

16-bit logits are computed in fp32. fp32 logits are computed in fp64, with an exponential made for the purpose.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import Rows, cdiv, launch, power_of_2
from ft_kernels.ops.cross_entropy.reference import Settings
from ft_kernels.ops.row_softmax.kernels import changed, exp_wide, fold, narrowed, plain_gradient, slope

__all__ = ["backward", "backward_into", "forward", "forward_into", "wide_dtype"]

READING = (8, 2)
"""Warps on a long row, and 16-byte loads that each thread has under way, where a row is only read."""
WRITING = (32, 2)
"""The same where the gradient follows: so many warps that few rows are under way, and L2 holds them the second time."""
IN_FP64 = (8, 1)
"""The same for fp32 logits, whose arithmetic takes twice the registers."""
WORTH_TRYING = {False: [(4, 2), (4, 4), (8, 2), (8, 4), (16, 2)], True: [(8, 2), (8, 4), (16, 4), (32, 2), (32, 4)]}
"""What autotune tries, without and with a gradient."""
MAX_BLOCK = 4096
"""Elements of a row that a program of the backward pass computes."""


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of per-row results for logits like these."""
    return torch.float64 if logits.dtype == torch.float32 else torch.float32


@triton.jit
def _forward(
    logits, inner, outer_stride, inner_stride, targets, losses, lses, rests, entropies, out, out_stride,
    V, ignore_index, smoothing: tl.float64, scale: tl.float64, softcap: tl.float64, height: tl.float64,
    z_loss: tl.float64, gradient_scale: tl.float64,
    SMOOTHED: tl.constexpr, CHANGED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr, GRADIENT: tl.constexpr,
    WIDE: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = UNROLL * LANES * PACK
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    at = tl.arange(0, UNROLL)[:, None, None] * (LANES * PACK) + (lane * PACK)[None, :, None]
    at += tl.arange(0, PACK)[None, None, :]
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        tl.store(lses + row, 0.0)
        tl.store(rests + row, 0.0)
        if ENTROPY:
            tl.store(entropies + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                nothing = tl.full((UNROLL, LANES, PACK), 0.0, out.dtype.element_ty)
                tl.store(out + row * out_stride + start + at, nothing, mask=start + at < V)
        return
    scale = tl.full((), scale, WIDE)
    softcap = tl.full((), softcap, WIDE)
    height = tl.full((), height, WIDE)
    smoothing = tl.full((), smoothing, WIDE)
    z_loss = tl.full((), z_loss, WIDE)
    source = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    valid = (target >= 0) & (target < V)
    column = tl.where(valid, target, 0).to(tl.int32)
    own = tl.load(source + column).to(WIDE)
    own = tl.where(valid, own, float("nan"))  # a target outside the vocabulary: loud, and no stray read
    picked = own
    if CHANGED:
        picked = changed(own, scale, softcap, height, CAPPED)

    maximum = tl.full((LANES,), float("-inf"), WIDE)
    sums = tl.full((LANES,), 0.0, WIDE)
    weighted = tl.full((LANES,), 0.0, WIDE)
    total = tl.full((LANES,), 0.0, WIDE)
    whole = V // BLOCK
    home = column // BLOCK
    unmasked = tl.where(home < whole, whole - 1, whole)
    for i in range(unmasked):
        z = tl.load(source + tl.where(i < home, i, i + 1) * BLOCK + at).to(WIDE)
        if CHANGED:
            z = changed(z, scale, softcap, height, CAPPED)
        if SMOOTHED:
            total += tl.sum(tl.sum(z, 2), 0)
        maximum, sums, weighted = fold(z, maximum, sums, weighted, WIDE, ENTROPY)
    for i in range(unmasked, (V + BLOCK - 1) // BLOCK):
        cols = tl.where(i == unmasked, home, whole) * BLOCK + at
        z = tl.load(source + cols, mask=cols < V, other=0.0).to(WIDE)
        if CHANGED:
            z = changed(z, scale, softcap, height, CAPPED)
        if SMOOTHED:
            total += tl.sum(tl.sum(tl.where(cols < V, z, 0.0), 2), 0)
        z = tl.where((cols < V) & (cols != column), z, float("-inf"))
        maximum, sums, weighted = fold(z, maximum, sums, weighted, WIDE, ENTROPY)

    top = tl.max(maximum, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    aligned = tl.exp(maximum - top)
    others = tl.sum(sums * aligned, 0)
    # How far the largest of the others is ahead of the target; there may be no others, or none but −inf.
    ahead = tl.where(others == 0.0, float("-inf"), top - picked)
    below = ahead > 0
    far = tl.exp(-tl.maximum(ahead, 0.0))
    behind = tl.exp(tl.minimum(ahead, 0.0))
    near = others * behind
    # log1p as Kahan has it: the rounding of 1 + near is undone by dividing by what was really added.
    sum_near = 1.0 + near
    added = tl.where(sum_near == 1.0, 1.0, sum_near - 1.0)
    log_near = tl.where(sum_near == 1.0, near, tl.log(sum_near) * near / added)
    log_far = tl.log(others + far)
    loss = tl.where(below, ahead + log_far, log_near)
    lse = tl.where(below, top + log_far, picked + log_near)
    rest = tl.where(below, others / (others + far), near / sum_near)
    bad = (picked != picked) | (picked == float("inf")) | (picked == float("-inf")) & (others == 0.0)
    loss = tl.where(bad, float("nan"), loss)
    lse = tl.where(bad, float("nan"), lse)
    rest = tl.where(bad, float("nan"), rest)
    if ENTROPY:
        moved = tl.where(sums == 0.0, 0.0, (maximum - top) * sums)
        mean = tl.sum((weighted + moved) * aligned, 0)  # Σ exp(z − top)·(z − top) over the others
        if_below = log_far - (mean - tl.where(far == 0.0, 0.0, far * ahead)) / (others + far)
        closer = mean * behind + tl.where(near == 0.0, 0.0, near * ahead)
        entropy = tl.where(below, if_below, log_near - closer / sum_near)
        tl.store(entropies + row, tl.where(bad, float("nan"), entropy))
    tl.store(lses + row, lse)
    tl.store(rests + row, rest)
    share = smoothing / V
    extra = 2.0 * z_loss * lse
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(total, 0) / V)
    tl.store(losses + row, loss + z_loss * lse * lse)

    if GRADIENT:
        tl.debug_barrier()  # out may be where the logits are
        result = out + row * out_stride
        g = tl.full((), gradient_scale, WIDE)
        factor = g * (1.0 + extra)
        shared = g * share
        for i in range(whole):
            x = tl.load(source + i * BLOCK + at).to(WIDE)
            dz = plain_gradient(x, lse, factor, shared, scale, softcap, height, SMOOTHED, CHANGED, CAPPED, WIDE)
            tl.store(result + i * BLOCK + at, narrowed(dz, out))
        if whole * BLOCK < V:
            cols = whole * BLOCK + at
            x = tl.load(source + cols, mask=cols < V, other=0.0).to(WIDE)
            dz = plain_gradient(x, lse, factor, shared, scale, softcap, height, SMOOTHED, CHANGED, CAPPED, WIDE)
            tl.store(result + cols, narrowed(dz, out), mask=cols < V)
        tl.debug_barrier()  # the target's own is written over what was written there
        dz = g * (extra * (1.0 - rest) - rest + smoothing - share)
        if CHANGED:
            dz *= slope(own, scale, softcap, height, CAPPED)
        tl.store(result + column, narrowed(dz, out))


@triton.jit
def _backward(
    grads, entropy_grads, logits, inner, outer_stride, inner_stride, targets, lses, rests, entropies, out, out_stride,
    V, first, ignore_index, smoothing: tl.float64, share: tl.float64, scale: tl.float64, softcap: tl.float64,
    height: tl.float64, z_loss: tl.float64,
    SMOOTHED: tl.constexpr, CHANGED: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = cols < V
    result = out + row * out_stride + cols
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(result, tl.full((BLOCK,), 0.0, out.dtype.element_ty), mask=there)
        return
    scale = tl.full((), scale, WIDE)
    softcap = tl.full((), softcap, WIDE)
    height = tl.full((), height, WIDE)
    target -= first
    source = logits + (row // inner) * outer_stride + (row % inner) * inner_stride
    grad = tl.load(grads + row).to(WIDE)
    lse = tl.load(lses + row)
    rest = tl.load(rests + row)
    x = tl.load(source + cols, mask=there, other=0.0).to(WIDE)
    z = x
    if CHANGED:
        z = changed(x, scale, softcap, height, CAPPED)
    p = exp_wide(z - lse) if tl.float64 == WIDE else tl.exp(z - lse)
    extra = 2.0 * tl.full((), z_loss, WIDE) * lse
    own = extra * (1.0 - rest) - rest
    dz = p * (1.0 + extra)
    if SMOOTHED:
        dz -= tl.full((), share, WIDE)
        own += tl.full((), smoothing, WIDE) - tl.full((), share, WIDE)
    dz = tl.where(cols == target, own, dz) * grad
    if ENTROPY:
        entropy_grad = tl.load(entropy_grads + row).to(WIDE)
        entropy = tl.load(entropies + row)
        dz -= entropy_grad * tl.where(p == 0.0, 0.0, p * (z - lse + entropy))
    if CHANGED:
        dz *= slope(x, scale, softcap, height, CAPPED)
    tl.store(result, narrowed(dz, out), mask=there)


def _is_wide(logits: Tensor) -> tl.dtype:
    return tl.float64 if wide_dtype(logits) == torch.float64 else tl.float32


def _numbers(settings: Settings) -> dict[str, Any]:
    """The settings as both kernels take them."""
    capped = settings.softcap != 0.0
    scale = settings.logit_scale if capped else settings.logit_scale / settings.temperature
    return {
        "ignore_index": settings.ignore_index,
        "smoothing": settings.label_smoothing,
        "scale": scale,
        "softcap": settings.softcap if capped else 1.0,
        "height": settings.softcap / settings.temperature,
        "z_loss": settings.z_loss,
        "SMOOTHED": settings.label_smoothing != 0.0,
        "CHANGED": capped or scale != 1.0,
        "CAPPED": capped,
    }


def _tiling(rows: Rows, vocabulary: int, gradient: bool) -> dict[str, int]:
    """How a program of the forward pass reads a row."""
    itemsize = rows.tensor.element_size()
    pack = 16 // itemsize
    if rows.tensor.data_ptr() % 16 or any(stride * itemsize % 16 for stride in rows.layout[1:]):
        pack = 1  # no row starts where a 16-byte load may

    def tiling(warps: int, loads: int) -> dict[str, int]:
        unroll = loads if pack > 1 else 4 * loads
        warps = min(warps, power_of_2(cdiv(vocabulary, 32 * pack * unroll)))
        return {"UNROLL": unroll, "LANES": 32 * warps, "PACK": pack, "num_warps": warps}

    wide = rows.tensor.dtype == torch.float32
    default = tiling(*(IN_FP64 if wide else WRITING if gradient else READING))
    choices = [tiling(*choice) for choice in WORTH_TRYING[gradient]] if vocabulary >= 2**15 and not wide else []
    key = (vocabulary, rows.tensor.dtype, pack, gradient)
    return tuning.settings("cross_entropy_forward", rows.tensor.device, key, default=default, candidates=choices)


def forward_into(
    results: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    targets: Tensor,
    settings: Settings,
    *,
    entropies: Tensor | None = None,
    gradient: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> None:
    """Write each row's loss, logsumexp and 1 − p(target), in ``wide_dtype``, and what else there is a place for.

    Args:
        results: the three, contiguous.
        logits: ``[..., V]``, not empty.
        targets: contiguous.
        entropies: a place for each row's entropy, or None.
        gradient: a place ``[rows, V]`` for the gradient of the sum of the losses, times ``gradient_scale``, or None;
            it may be the logits' own.
    """
    rows, vocabulary = Rows(logits), logits.shape[-1]
    out = logits if gradient is None else gradient
    launch(
        "cross_entropy_forward", _forward, (rows.count,), logits.device,
        rows.tensor, *rows.layout, targets, *results, results[0] if entropies is None else entropies,
        out, 0 if gradient is None else gradient.stride(0), vocabulary,
        gradient_scale=gradient_scale, ENTROPY=entropies is not None, GRADIENT=gradient is not None,
        WIDE=_is_wide(logits), **_numbers(settings), **_tiling(rows, vocabulary, gradient is not None),
    )  # fmt: skip


def backward_into(
    out: Tensor,
    grads: Tensor,
    logits: Tensor,
    targets: Tensor,
    lses: Tensor,
    rests: Tensor,
    settings: Settings,
    *,
    entropies: Tensor | None = None,
    entropy_grads: Tensor | None = None,
    first: int = 0,
    vocabulary: int | None = None,
) -> None:
    """Write the gradient of the logits from the gradients of each row's loss and entropy.

    Args:
        out: ``[..., V]`` with evenly spaced rows, not empty; it may be the logits' own place.
        entropies, entropy_grads: both or neither.
        first, vocabulary: where the logits are some columns of a larger vocabulary, the first one's number and how
            many columns there are in all.
    """
    rows, width = Rows(logits), logits.shape[-1]
    block = min(power_of_2(width), MAX_BLOCK)
    launch(
        "cross_entropy_backward", _backward, (rows.count, cdiv(width, block)), logits.device,
        grads, grads if entropy_grads is None else entropy_grads, rows.tensor, *rows.layout, targets, lses, rests,
        lses if entropies is None else entropies, out, out.stride(-2) if out.dim() > 1 else 0, width, first,
        share=settings.label_smoothing / (vocabulary or width), ENTROPY=entropy_grads is not None,
        WIDE=_is_wide(logits), BLOCK=block, num_warps=min(8, max(1, block // 256)), **_numbers(settings),
    )  # fmt: skip


def forward(logits: Tensor, targets: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's loss, logsumexp and 1 − p(target), in ``wide_dtype``."""
    losses, lses, rests = (dispatch.allocate(targets.shape, wide_dtype(logits), logits.device) for _ in range(3))
    if logits.numel():
        forward_into((losses, lses, rests), logits, targets.contiguous(), settings)
    return losses, lses, rests


def backward(grads: Tensor, logits: Tensor, targets: Tensor, lses: Tensor, rests: Tensor, settings: Settings) -> Tensor:
    """The gradient of the logits (contiguous, their dtype) from the gradient of each row's loss."""
    out = dispatch.allocate(logits.shape, logits.dtype, logits.device)
    if out.numel():
        backward_into(out, grads.contiguous(), logits, targets.contiguous(), lses, rests, settings)
    return out
