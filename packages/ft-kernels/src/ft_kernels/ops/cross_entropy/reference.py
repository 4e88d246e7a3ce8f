"""Cross-entropy in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy_rows"]


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
) -> Tensor:
    """The loss of each row, before reduction, differentiable by torch; see :func:`ft_kernels.functional.cross_entropy`.

    ``softcap`` is 0 where there is none.
    """
    valid = targets != ignore_index
    # An ignored row is blanked before anything is computed from it: its gradient is zero whatever it holds.
    z = torch.where(valid.unsqueeze(-1), logits, 0).to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1:
        z = z * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z, -1)
    loss = -log_p.gather(-1, torch.where(valid, targets, 0).unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(z, -1).square()
    return torch.where(valid, loss, 0)
