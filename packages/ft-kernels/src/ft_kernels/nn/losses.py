"""Losses as layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional import Lora, Reduction, cross_entropy, linear_cross_entropy

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


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


class LinearCrossEntropyLoss(CrossEntropyLoss):
    """:func:`ft_kernels.linear_cross_entropy` with its settings fixed; the head's weight is an argument."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        z_loss: float = 0.0,
        reduction: Reduction = "mean",
        max_memory: int = 2**30,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            reduction=reduction,
        )
        self.max_memory = max_memory

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, lora: Lora | None = None
    ) -> Tensor:
        """The loss of ``[..., H]`` hidden states under a head ``[V, H]`` against ``[...]`` targets."""
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            lora=lora,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            z_loss=self.z_loss,
            reduction=self.reduction,
            max_memory=self.max_memory,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_memory={self.max_memory}"
