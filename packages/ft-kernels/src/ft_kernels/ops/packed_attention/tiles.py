"""How the kernels of packed attention run on each card."""

from __future__ import annotations

import torch

from ft_kernels import tuning
from ft_kernels.dispatch import interpreting

__all__ = ["tiles"]

_TILES: dict[str, dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    # Queries, keys, warps and stages of a tile, for heads of up to 64, 128 and 256. Where registers were what limits a
    # tile, it is the largest that keeps its sums in them.
    "small": {
        "forward": ((128, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "keys": ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        "queries": ((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
    },
    "ampere": {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "keys": ((64, 128, 8, 2), (64, 64, 8, 2), (16, 64, 8, 1)),
        "queries": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    },
    "hopper": {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        "keys": ((64, 128, 8, 2), (32, 128, 8, 2), (16, 64, 8, 2)),
        "queries": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 1)),
    },
    "blackwell": {
        "forward": ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
        "keys": ((64, 64, 8, 2), (64, 64, 8, 1), (16, 64, 8, 1)),
        "queries": ((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 1)),
    },
}


def tiles(kernel: str, d: int, device: torch.device) -> dict[str, int]:
    """Queries and keys of a tile, warps and stages of "forward", "keys" or "queries" (the backward pass's kernels).

    Args:
        d: what heads are padded to, a power of two.
    """
    if interpreting():
        return {"M": 16, "N": 16}
    family = tuning.family(device)
    if tuning.shared_memory(device) < 163 << 10 or family not in _TILES:
        family = "small"
    m, n, warps, stages = _TILES[family][kernel][(d > 64) + (d > 128)]
    return {"M": m, "N": n, "num_warps": warps, "num_stages": stages}
