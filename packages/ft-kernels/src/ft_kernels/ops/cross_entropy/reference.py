"""Cross-entropy in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Settings", "cross_entropy_rows", "final_logits"]


class Settings(NamedTuple):
    """What a loss from logits depends on besides them; ``softcap`` is 0 where there is none."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    logit_scale: float
    z_loss: float
    temperature: float = 1.0


def final_logits(logits: Tensor, settings: Settings) -> Tensor:
    """The logits in at least fp32, scaled, capped and divided by the temperature."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if settings.logit_scale != 1:
        z = z * settings.logit_scale
    if settings.softcap:
        z = settings.softcap * torch.tanh(z / settings.softcap)
    return z / settings.temperature if settings.temperature != 1 else z


def cross_entropy_rows(logits: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    """Each row's loss, before reduction, differentiable by torch; see :func:`ft_kernels.functional.cross_entropy`."""
    valid = targets != settings.ignore_index
    # An ignored row is blanked before anything is computed from it: its gradient is zero whatever it holds.
    z = final_logits(torch.where(valid.unsqueeze(-1), logits, 0), settings)
    log_p = torch.log_softmax(z, -1)
    loss = -log_p.gather(-1, torch.where(valid, targets, 0).unsqueeze(-1)).squeeze(-1)
    if settings.label_smoothing:
        loss = (1 - settings.label_smoothing) * loss - settings.label_smoothing * log_p.mean(-1)
    if settings.z_loss:
        loss = loss + settings.z_loss * torch.logsumexp(z, -1).square()
    return torch.where(valid, loss, 0)
