"""What is done with the logits of some rows: by kernels in place, or in plain torch with a few copies of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.ops.cross_entropy.reference import Settings, final_logits

__all__ = ["gradient_step", "loss_step", "scaled", "step_dtype"]


def step_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of a row's loss, logsumexp, 1 − p(target) and entropy."""
    # Of fp32 too it is as exact as can be, on devices that know float64.
    return torch.float32 if logits.dtype.itemsize < 4 or logits.device.type == "mps" else torch.float64


def loss_step(
    results: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    targets: Tensor,
    settings: Settings,
    kernels: bool,
    *,
    entropies: Tensor | None,
    gradient_scale: float | None,
) -> None:
    """Write each row's loss, logsumexp, 1 − p(target) and, if asked, entropy.

    Given a ``gradient_scale``, the gradient of the sum of the losses, times that, takes the logits' place.
    """
    if kernels:
        from ft_kernels.ops.cross_entropy.kernels import forward_into

        gradient = None if gradient_scale is None else logits
        forward_into(
            results, logits, targets, settings,
            entropies=entropies, gradient=gradient, gradient_scale=gradient_scale or 1.0,
        )  # fmt: skip
        return
    valid, column = _columns(targets, settings)
    z = final_logits(torch.where(valid, logits, 0).to(step_dtype(logits)), settings)
    lse = torch.logsumexp(z, -1, keepdim=True)
    log_p = torch.log_softmax(z, -1)
    picked = log_p.gather(-1, column)
    alpha = settings.label_smoothing
    loss = (1 - alpha) * -picked + settings.z_loss * lse.square()
    if alpha:
        loss = loss + alpha * (lse - z.mean(-1, keepdim=True))
    kept = (loss, lse, -torch.expm1(picked))
    if entropies is not None:
        p = log_p.exp()
        entropies.copy_(torch.where(valid, -torch.where(p == 0, 0, p * log_p).sum(-1, keepdim=True), 0)[:, 0])
        del p
    for result, value in zip(results, kept, strict=True):
        result.copy_(torch.where(valid, value, 0)[:, 0])
    del z, log_p
    if gradient_scale is not None:
        grads = torch.full_like(results[0], gradient_scale)
        gradient_step(logits, targets, settings, kernels, grads, None, results[1], results[2], None)


def gradient_step(
    logits: Tensor,
    targets: Tensor,
    settings: Settings,
    kernels: bool,
    grads: Tensor,
    entropy_grads: Tensor | None,
    lses: Tensor,
    rests: Tensor,
    entropies: Tensor | None,
    *,
    first: int = 0,
    vocabulary: int | None = None,
) -> None:
    """Turn logits into their gradient, given those of each row's loss and entropy and what ``loss_step`` wrote.

    The logits may be those of some columns: from ``first`` on, of a vocabulary of that size.
    """
    if kernels:
        from ft_kernels.ops.cross_entropy.kernels import backward_into

        backward_into(
            logits, grads, logits, targets, lses, rests, settings,
            entropies=entropies, entropy_grads=entropy_grads, first=first, vocabulary=vocabulary,
        )  # fmt: skip
        return
    width = logits.shape[-1]
    valid, column = _columns(targets, settings)
    column = column - first
    here = valid & (column >= 0) & (column < width)
    z = final_logits(torch.where(valid, logits, 0).to(step_dtype(logits)), settings)
    log_p = z - lses[:, None]
    p = log_p.exp()
    extra = 2 * settings.z_loss * lses[:, None]
    alpha = settings.label_smoothing
    share = alpha / (vocabulary or width)
    own = extra * (1 - rests[:, None]) - rests[:, None] + alpha - share
    column = column.clamp(0, width - 1)
    dz = p * (1 + extra) - share
    dz.scatter_(-1, column, torch.where(here, own, dz.gather(-1, column)))
    dz *= grads[:, None]
    if entropy_grads is not None and entropies is not None:
        dz -= entropy_grads[:, None] * torch.where(p == 0, 0, p * (log_p + entropies[:, None]))
    if settings.softcap:
        dz *= 1 - (z * (settings.temperature / settings.softcap)).square()
    dz *= settings.logit_scale / settings.temperature
    logits.copy_(torch.where(valid, dz, 0))


def _columns(targets: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    valid = (targets != settings.ignore_index)[:, None]
    return valid, torch.where(valid, targets[:, None], 0)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, kernels: bool, *, out: Tensor | None = None) -> Tensor:
    """``x`` times a factor, or a factor for each row, in that dtype; zeros stay zeros, whatever the factor.

    ``out`` may be x's own place.
    """
    if kernels:
        from ft_kernels.ops.linear_head.kernels import scaled_into

        return scaled_into(x, factor, dtype, out)
    result = torch.empty_like(x, dtype=dtype) if out is None else out
    rows = max(1, 2**16 // max(x.shape[-1], 1)) if x.dim() == 2 else max(x.shape[0], 1)
    parts = factor.split(rows) if factor.dim() else [factor] * -(-x.shape[0] // rows)
    for part, into, by in zip(x.split(rows), result.split(rows), parts, strict=False):
        into.copy_(torch.where(part == 0, 0, part * (by[:, None] if by.dim() else by)))
    return result
