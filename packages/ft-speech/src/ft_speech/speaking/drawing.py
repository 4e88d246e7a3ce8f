"""Draws what is spoken next: one of the places that a model has scores of."""

from __future__ import annotations

from typing import Any

__all__ = ["draw"]


def draw(scores: Any, temperature: float, top_p: float, chance: Any) -> int:
    """One of the scores' places: the highest, or one drawn from the nucleus of ``top_p`` (Holtzman et al. 2020).

    Args:
        scores: float32 [places], on the CPU. temperature: 0 takes the highest.
        chance: the ``torch.Generator`` that is drawn from.
    """
    import torch

    if temperature == 0:
        return int(scores.argmax())
    shares, order = torch.softmax(scores / temperature, -1).sort(descending=True, stable=True)
    shares[shares.cumsum(-1) - shares >= top_p] = 0
    return int(order[torch.multinomial(shares, 1, generator=chance)])
