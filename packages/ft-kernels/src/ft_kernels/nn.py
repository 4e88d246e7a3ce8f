"""The operations as layers, which hold their settings and weights and nothing else: no state between calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional import Reduction, cross_entropy, rms_norm

__all__ = ["CrossEntropyLoss", "RMSNorm"]


class RMSNorm(torch.nn.Module):
    """:func:`ft_kernels.rms_norm` with a weight of its own.

    Args:
        hidden_size: H, the size of the last dimension.
        eps: added to the mean square.
        offset: added to the weight. The weight starts at ``1 − offset``, which is the plain norm.
        weight: whether there is one.
        device, dtype: where and what the weight is.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        weight: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.offset = offset
        self.weight: torch.nn.Parameter | None
        if weight:
            self.weight = torch.nn.Parameter(torch.full((hidden_size,), 1 - offset, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., hidden_size]``."""
        return rms_norm(x, self.weight, self.eps, offset=self.offset)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, offset={self.offset}, weight={self.weight is not None}"


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
