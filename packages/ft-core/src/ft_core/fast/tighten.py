"""A plan that keeps less, for a batch that did not fit."""

from __future__ import annotations

import torch

from ft_core.fast.choose import TILE
from ft_core.fast.swap import FastPath

__all__ = ["tighten"]

BOUNDS = (0.9, 0.8)
"""Of the memory that there is, what is planned with from now on: the first time, and where little was kept already."""
LEAST_TILE = 1024
"""Tokens of the smallest sequence tile."""
LOGITS = 2**26
"""Bytes for the head, where little was kept already."""


def tighten(path: FastPath, tokens: int, device: torch.device) -> str:
    """Let the layers keep as little as can be in the next batch, and plan with less memory from then on.

    Long batches are computed in tiles. Where the layers kept next to nothing already, what is left is made smaller:
    the tiles, and the logits that exist at a time. Recorded steps are given up with their memory.

    Args:
        path: of the model; what it was told to keep (:meth:`FastPath.choose`) holds no longer.
        tokens: of the batch that did not fit, padding included.

    Returns:
        The plan in words.
    """
    chooser = path.chooser
    lean = not {"keep", "inputs"} & set(chooser.chosen)
    path.graphs.drop()
    path.host.begin()
    chooser.tighten(device, BOUNDS[lean], LOGITS if lean else None)
    words = ["as little kept as can be"]
    if chooser.cap is not None:
        words.append(f"up to {chooser.cap / 2**30:.2f} GiB")
    before = path.tile
    if lean:
        path.tile = TILE // 2 if before is None else max(before // 2, min(LEAST_TILE, before))
        words.append(f"{LOGITS >> 20} MiB of logits at a time")
    elif before is None and tokens > TILE:
        path.tile = TILE
    if path.tile != before and tokens > (path.tile or 0):
        words.append(f"tiles of {path.tile} tokens")
    return ", ".join(words)
