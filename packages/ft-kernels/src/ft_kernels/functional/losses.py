"""Losses whose logits are given."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.cross_entropy.autograd import cross_entropy_op
from ft_kernels.ops.cross_entropy.reference import Settings, cross_entropy_rows

__all__ = ["Reduction", "check_reduction", "check_settings", "cross_entropy"]

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of logits against class numbers, the classes in the last dimension.

    With ``z = softcap · tanh(logit_scale · logits / softcap)`` (without a softcap, ``z = logit_scale · logits``),
    ``p = softmax(z)`` and V classes, the loss of a row with target t is

        ``(1 − label_smoothing) · (−log p_t) − label_smoothing / V · Σ_j log p_j + z_loss · logsumexp(z)²``

    Label smoothing: Szegedy et al. 2016, section 7 (arXiv:1512.00567). Softcap: Gemma 2, section 2 (arXiv:2408.00118).
    z-loss: PaLM, section 5 (arXiv:2204.02311).

    Args:
        logits: ``[..., V]``, floating point, any strides. V is any number from 1.
        targets: ``[...]``, integers from 0 to V − 1, or ``ignore_index``.
        ignore_index: rows with this target give no loss and a gradient of zero, whatever their logits.
        label_smoothing: from 0 to 1.
        softcap: a positive bound on the logits, or None.
        logit_scale: multiplies the logits, before the softcap; positive.
        z_loss: weight of the squared logsumexp, at least 0.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"`` for one loss a row.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; in fp32, in float64 for float64 logits. Where every row is ignored or
        there is none, the sum is 0 and the mean is nan, with zero gradients, as torch's own ``cross_entropy`` has it.

    Raises:
        TypeError: logits are not floating point, or targets not integers.
        ValueError: shapes, devices or settings do not fit.
        IndexError, RuntimeError: a target is outside the vocabulary, where torch computes; a kernel cannot raise
            without stopping the GPU's queue, and makes that row's loss and gradient nan instead.
    """
    _check_cross_entropy(logits, targets)
    check_settings("cross_entropy", softcap, logit_scale, label_smoothing, z_loss)
    check_reduction("cross_entropy", reduction)
    targets = targets.long()
    settings = Settings(ignore_index, float(label_smoothing), float(softcap or 0.0), float(logit_scale), float(z_loss))
    if use_triton(logits):
        losses: Tensor = cross_entropy_op(logits, targets, *settings[:5])[0]
    else:
        losses = cross_entropy_rows(logits, targets, settings)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / (targets != ignore_index).sum()
    return total.to(dtype)


def _check_cross_entropy(logits: Tensor, targets: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"cross_entropy: logits have dtype {logits.dtype}; use a floating-point dtype")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"cross_entropy: targets have dtype {targets.dtype}; use class numbers of an integer dtype")
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"cross_entropy: logits {list(logits.shape)} and targets {list(targets.shape)} do not fit; "
            "targets need the shape of logits without the last dimension"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: logits {list(logits.shape)} have no classes; the last dimension is V, from 1")
    if logits.device != targets.device:
        raise ValueError(f"cross_entropy: logits are on {logits.device}, targets on {targets.device}; use one device")


def check_settings(
    where: str, softcap: float | None, logit_scale: float, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> None:
    """Raise for a setting that no loss of logits takes; nan is none of them."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{where}: label_smoothing={label_smoothing}; allowed is 0 to 1")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{where}: softcap={softcap}; allowed is a positive number, or None for no cap")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"{where}: logit_scale={logit_scale}; allowed is a positive number")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{where}: z_loss={z_loss}; allowed is 0 or more")


def check_reduction(where: str, reduction: str) -> None:
    """Raise for a reduction of another name."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{where}: reduction={reduction!r}; allowed are 'mean', 'sum' and 'none'")
