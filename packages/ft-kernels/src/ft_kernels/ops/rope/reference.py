"""Rotary position embedding in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["angles", "rope", "rotate", "streams_of_pairs"]


def streams_of_pairs(pairs: int, sections: Sequence[int], interleaved: bool) -> list[int]:
    """Which position stream turns each pair.

    In blocks, ``sections[n]`` pairs in a row belong to stream n. Interleaved (three streams), pair i belongs to stream
    i % 3 as long as that stream has pairs left, and to stream 0 otherwise.
    """
    if interleaved:
        return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(pairs)]
    return [stream for stream, count in enumerate(sections) for _ in range(count)]


def angles(table: Tensor, positions: Tensor | None, sections: Sequence[int], interleaved_sections: bool) -> Tensor:
    """Cosines (or sines) ``[B, S, pairs]`` from ``[streams, B, S, pairs]``, or from ``[P, pairs]`` and positions.

    Raises:
        IndexError: a position is not in the table.
    """
    if positions is not None:
        table = F.embedding(positions, table)
    if not sections:
        return table[0]
    pairs = table.shape[-1]
    streams = torch.tensor(streams_of_pairs(pairs, sections, interleaved_sections), device=table.device)
    return table[streams, :, :, torch.arange(pairs, device=table.device)].movedim(0, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x ``[B, S, heads, D]`` turned by angles ``[B, S, pairs]``; the dimensions after the pairs are x's."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    rotary = 2 * cos.shape[-1]
    turning, rest = x[..., :rotary].to(wide), x[..., rotary:]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = turning.chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    sections: Sequence[int],
    interleaved: bool,
    interleaved_sections: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`ft_kernels.functional.rope` on ``[B, S, heads, D]``, differentiable by torch, twice too."""
    cos, sin = (angles(table, positions, sections, interleaved_sections) for table in (cos, sin))
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
