"""The next token of each sequence, as transformers' generation chooses it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["choose"]


def choose(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The likeliest token of each row, or one drawn from the rows' distributions.

    With a temperature, from ``softmax(logits / temperature)`` in fp32; with ``top_p`` below 1, from the likeliest
    tokens that have this share together (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751), operation for
    operation as transformers' ``TopPLogitsWarper``: the same tokens come of the same seed. Nothing waits for the
    device.

    Args:
        logits: ``[B, V]``.
        temperature: 0 takes the likeliest.
        top_p: from 0 to 1; the likeliest token is always among those drawn from.

    Returns:
        ``[B]``, int64.
    """
    scores = logits.float()
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    if top_p < 1.0:
        ordered, order = torch.sort(scores, descending=False)
        left = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        left[..., -1:] = False
        scores = scores.masked_fill(left.scatter(1, order, left), float("-inf"))
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]
