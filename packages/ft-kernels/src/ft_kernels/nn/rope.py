"""Rotary position embedding as a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ft_kernels.functional import RopeLayout, rope

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(torch.nn.Module):
    """:func:`ft_kernels.rope` with angles from positions: ``θ = position · base^(−2i / rotary_dim)``, in fp32.

    Args:
        rotary_dim: how many dimensions of a head are turned, from the first on; even.
        base: the longest wavelength over 2π.
        scale: multiplies cosine and sine (YaRN's attention factor).
        layout, heads_dim, sections, interleaved_sections: as for :func:`ft_kernels.rope`.
        device: where the frequencies are.
    """

    inverse_frequencies: Tensor

    def __init__(
        self,
        rotary_dim: int,
        base: float = 10000.0,
        *,
        scale: float = 1.0,
        layout: RopeLayout = "half",
        heads_dim: int = -2,
        sections: Sequence[int] | None = None,
        interleaved_sections: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim
        self.base = base
        self.scale = scale
        self.layout: RopeLayout = layout
        self.heads_dim = heads_dim
        self.sections = sections
        self.interleaved_sections = interleaved_sections
        powers = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        self.register_buffer("inverse_frequencies", 1.0 / base**powers, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None, *, inplace: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Turn q and k by their positions (``[S]``, ``[B or 1, S]``, streams first; by default 0, 1, 2, …)."""
        if position_ids is None:
            sequence_dim = -2 if self.heads_dim % q.dim() == q.dim() - 3 else -3
            position_ids = torch.arange(q.shape[sequence_dim], device=q.device)
            if self.sections:
                position_ids = position_ids.expand(len(self.sections), -1)
        angles = position_ids[..., None].float() * self.inverse_frequencies.float()
        return rope(
            q,
            k,
            angles.cos() * self.scale,
            angles.sin() * self.scale,
            rotary_dim=self.rotary_dim,
            layout=self.layout,
            heads_dim=self.heads_dim,
            inplace=inplace,
            sections=self.sections,
            interleaved_sections=self.interleaved_sections,
        )

    def extra_repr(self) -> str:
        names = ("base", "scale", "layout", "heads_dim", "sections", "interleaved_sections")
        return f"{self.rotary_dim}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
