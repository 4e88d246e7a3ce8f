"""Attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_kernels.functional.attention import Backend, packed_attention
from ft_kernels.ops.packed_attention.plan import AttentionPlan

__all__ = ["PackedAttention"]


class PackedAttention(torch.nn.Module):
    """:func:`ft_kernels.packed_attention` with its settings fixed and, if asked for, sinks of its own.

    Args:
        heads: H, the number of query heads, or None for no sinks. The sinks start at zero.
        causal, window, softcap, scale, backend: as the function has them.
        device, dtype: where and what the sinks are.
    """

    def __init__(
        self,
        heads: int | None = None,
        *,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        backend: Backend | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.backend = backend
        self.sinks: torch.nn.Parameter | None
        if heads is None:
            self.register_parameter("sinks", None)
        else:
            self.sinks = torch.nn.Parameter(torch.zeros(heads, device=device, dtype=dtype))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> Tensor:
        """Attend over ``[T, H, D]`` or ``[B, S, H, D]``; without a plan, each row is one document."""
        return packed_attention(
            q,
            k,
            v,
            plan=plan,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            scale=self.scale,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        names = ("causal", "window", "softcap", "scale", "backend")
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), f"sinks={self.sinks is not None}"])
