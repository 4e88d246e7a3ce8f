"""Launch settings of norms over rows, RMS and layer norms alike."""

from __future__ import annotations

from typing import Any

import torch

from ft_kernels import tuning
from ft_kernels.dispatch import interpreting, power_of_2

__all__ = ["backward_candidates", "backward_tiling", "forward_tiling", "sharing_programs"]

MAX_BLOCK = 16384
"""The longest row that one program holds whole, half as long in fp64; a longer one is read twice."""
TILE = 4096
"""Elements that a program works on at a time, where rows are shorter than that."""


def sharing_programs(device: torch.device, tiles: int, per_sm: int) -> int:
    """How many programs share the tiles, each with a line of sums of its own."""
    few = 3  # for the interpreter: each works on several tiles, and there are sums to add up
    return min(few if interpreting() else per_sm * tuning.multiprocessors(device), tiles)


def _tiling(h: int, wide: torch.dtype) -> dict[str, Any]:
    longest = MAX_BLOCK // 2 if wide == torch.float64 else MAX_BLOCK
    block = power_of_2(max(h, 1))
    whole = block <= longest
    block = min(block, longest)
    return {"BLOCK": block, "ROWS": max(1, TILE // block) if whole else 1, "WHOLE": whole}


def _warps(elements: int, words: int, wide: torch.dtype) -> int:
    """So many that a thread holds one copy of its elements in so many registers, between 4 and 16."""
    per_warp = 32 * words // (2 if wide == torch.float64 else 1)
    return min(16, max(4, elements // per_warp))


def forward_tiling(h: int, wide: torch.dtype) -> dict[str, Any]:
    """Launch settings of a forward pass over rows of h elements.

    HOIST: whether the scale is loaded before the row is added up; in fp64 registers run out.
    """
    tiling = _tiling(h, wide)
    warps = _warps(tiling["ROWS"] * tiling["BLOCK"], 32, wide)
    return tiling | {"HOIST": wide == torch.float32, "num_warps": warps}


def backward_tiling(h: int, wide: torch.dtype, device: torch.device, loop_bytes: int) -> dict[str, Any]:
    """Launch settings of a backward pass, which holds several copies of its elements.

    Args:
        h: the length of a row.
        wide: the dtype of the arithmetic.
        device: where it runs.
        loop_bytes: bytes that are loaded for an element in a loop over tiles; 0 where each program has one tile.

    Returns:
        HOIST: whether the scale is loaded first, and stays in registers from tile to tile. STAGES: how many tiles are
        worked on or on their way, by asynchronous copies (sm_80 and later) into half of a multiprocessor's shared
        memory. PER_SM: programs for each multiprocessor, where they loop.
    """
    tiling = _tiling(h, wide)
    elements = tiling["ROWS"] * tiling["BLOCK"]
    warps = _warps(elements, 16 if loop_bytes else 32, wide)
    hoist = not loop_bytes or elements * (2 if wide == torch.float64 else 1) <= 16 * 32 * warps
    stages = 1
    if loop_bytes and tiling["WHOLE"] and tuning.capability(device) >= (8, 0):
        loop_bytes += 0 if hoist else 4  # the scale is then loaded with each tile
        most = 2 if wide == torch.float64 else 3  # registers run out
        stages = min(most, 1 + tuning.shared_memory(device) // 2 // (elements * loop_bytes))
    return tiling | {"STAGES": stages, "HOIST": hoist, "PER_SM": 2 if warps <= 8 else 1, "num_warps": warps}


def backward_candidates(default: dict[str, Any]) -> list[dict[str, Any]]:
    """What autotune may try instead where programs loop."""
    if default["STAGES"] == 1:
        return []
    warps = {default["num_warps"], min(16, 2 * default["num_warps"])}
    return [default | {"num_warps": w, "PER_SM": n} for w in sorted(warps) for n in (1, 2, 3)]
