"""Losses as layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional import Reduction, cross_entropy

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.Module):
    """:func:`ft_kernels.cross_entropy` with its settings fixed; the classes are in the last dimension."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.z_loss = z_loss
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``[..., V]`` logits against ``[...]`` targets."""
        return cross_entropy(
            logits,
            targets,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        names = ("ignore_index", "label_smoothing", "softcap", "logit_scale", "z_loss", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
