"""The head and what follows it in plain torch, logits whole: what the chunked operation is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ft_kernels.ops.cross_entropy.reference import Settings, cross_entropy_rows, final_logits

__all__ = ["Head", "linear_head_rows", "logits_of"]


class Head(NamedTuple):
    """What makes logits of hidden states: ``h·Wᵀ + bias + scaling·(h·Aᵀ)·Bᵀ``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        a, b: ``[r, H]`` and ``[V, r]``, the low-rank update (LoRA, arXiv:2106.09685), or None and None.
        scaling: the update's factor.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """``[..., V]`` in the dtype of hidden."""
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias.to(hidden.dtype)
    if head.a is not None and head.b is not None:
        low = hidden @ head.a.to(hidden.dtype).t()
        logits = logits + head.scaling * (low @ head.b.to(hidden.dtype).t())
    return logits


def linear_head_rows(hidden: Tensor, head: Head, targets: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Each row's loss and entropy, both 0 for ignored rows; differentiable by torch, twice too."""
    logits = logits_of(hidden, head)
    losses = cross_entropy_rows(logits, targets, settings)
    valid = targets != settings.ignore_index
    log_p = torch.log_softmax(final_logits(torch.where(valid.unsqueeze(-1), logits, 0), settings), -1)
    p = log_p.exp()
    entropies = -torch.where(p == 0, 0, p * log_p).sum(-1)
    return losses, torch.where(valid, entropies, 0)
