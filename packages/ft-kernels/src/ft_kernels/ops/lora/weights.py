"""Frozen base weights as callers hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft_kernels.ops.lora.operands import Base, width

__all__ = ["WideWeight", "base_of", "widen"]


@dataclass(frozen=True, eq=False)
class WideWeight:
    """A frozen weight in rows with room for low-rank updates: ``[W | S]``, of which the operations fill S.

    ``weight`` and ``parts()`` are views, meant to be the parameters of plain modules: what is loaded, merged or saved
    there is what the operations compute with. The columns beside them are scratch memory that each operation fills
    before it reads them; two streams must not use one wide weight at the same time.

    Attributes:
        buffer: ``[N, width]``. in_features: K. sizes: the outputs of each projection, which lie one below the other.
    """

    buffer: Tensor
    in_features: int
    sizes: tuple[int, ...]

    @classmethod
    def empty(
        cls,
        sizes: Sequence[int],
        in_features: int,
        rank: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> WideWeight:
        """Uninitialized, with room for adapters of ``rank`` together, to be loaded into."""
        buffer = torch.empty(sum(sizes), width(in_features, rank), dtype=dtype, device=device)
        return cls(buffer, in_features, tuple(sizes))

    @property
    def weight(self) -> Tensor:
        """``[N, K]``, a view."""
        return self.buffer[:, : self.in_features]

    @property
    def room(self) -> int:
        """The most ranks that fit beside the weight."""
        return self.buffer.shape[1] - self.in_features

    def parts(self) -> tuple[Tensor, ...]:
        """Each projection's ``[N_i, K]``, views."""
        return tuple(self.weight.split(self.sizes))


def widen(weight: Tensor | Sequence[Tensor], rank: int) -> WideWeight:
    """Copy a frozen weight, or several with the same input one below the other, into rows with room for updates.

    Args:
        weight: ``[N, K]``, or several such.
        rank: of all adapters of this product together (three of rank 16 on q, k and v: 48).
    """
    parts = [weight] if isinstance(weight, Tensor) else list(weight)
    wide = WideWeight.empty(
        [p.shape[0] for p in parts], parts[0].shape[1], rank, dtype=parts[0].dtype, device=parts[0].device
    )
    for target, part in zip(wide.parts(), parts, strict=True):
        target.copy_(part.detach())
    return wide


def base_of(name: str, weight: object) -> Base:
    """The form in which the operations take a weight."""
    if isinstance(weight, WideWeight):
        return Base("wide", [weight.buffer], weight.in_features, list(weight.sizes))
    parts = [weight] if isinstance(weight, Tensor) or not isinstance(weight, Sequence) else list(weight)
    if not parts or not all(isinstance(p, Tensor) for p in parts):
        kinds = sorted({type(p).__name__ for p in parts})
        raise TypeError(f"{name}: the base weight is made of {kinds}; give tensors [N, K] or a WideWeight")
    tensors = [p for p in parts if isinstance(p, Tensor)]
    for part in tensors:
        if part.dim() != 2 or part.shape[1] != tensors[0].shape[1]:
            shapes = [list(p.shape) for p in tensors]
            raise ValueError(f"{name}: the base weight has shape {shapes}; each part needs [N, K] with the same K")
        if not part.is_floating_point():
            raise TypeError(f"{name}: the base weight has dtype {part.dtype}; use a floating-point dtype")
        if part.requires_grad:
            raise ValueError(
                f"{name}: the base weight requires a gradient, which is not computed here; freeze it "
                "(requires_grad_(False)), or train it with torch's own linear"
            )
    return Base("plain", tensors, tensors[0].shape[1], [p.shape[0] for p in tensors])
