"""The merged values of a weight, in fp32, block by block: no more than a block of a weight is ever in memory.

This is the making side: what it makes is checked in float64 by ``ft_export.merging.weights_check`` and in PEFT's own
arithmetic by ``ft_export.merging.logprobs_check``. The formulas are those of ``ft_export.merging.adapter``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ft_export.merging.adapter import Adapter, LowRank

if TYPE_CHECKING:
    import torch

__all__ = ["Blocks", "merged_bias", "merged_weight"]

Blocks = Callable[[], Iterable["torch.Tensor"]]
"""Makes a tensor's blocks of rows, in order; it may be called several times."""


def merged_weight(
    adapter: Adapter, change: LowRank, base: Blocks, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The base's weight with its low-rank product, and DoRA's norm, in blocks of the rows as they are stored.

    Args:
        base: the weight, of this ``shape``: ``(out, in)``, or ``(in, out)`` where it is stored turned (embeddings,
            GPT-2's Conv1D). An adapted embedding that the adapter holds itself is taken from there.
        dtype: to which each value is rounded, once.
    """
    import torch

    low, high = adapter.files.tensor(change.parts["A"]).float(), adapter.files.tensor(change.parts["B"]).float()
    turned = adapter.is_turned(change, shape)
    rows, columns = (low.T, high.T) if turned else (high, low)
    if "base" in change.parts:
        key, wide = change.parts["base"], next(iter(base())).dtype
        base = lambda: (block.to(wide) for block in adapter.files.blocks(key))  # noqa: E731

    def sums() -> Iterator[tuple[slice, torch.Tensor]]:
        start = 0
        for block in base():
            place = slice(start, start + len(block))
            yield place, torch.addmm(block.float(), rows[place], columns, alpha=change.scale)
            start = place.stop

    if "magnitude" not in change.parts:
        for _, value in sums():
            yield value.to(dtype)
        return
    magnitude = adapter.files.tensor(change.parts["magnitude"]).float().reshape(-1)
    if not turned:
        for place, value in sums():
            yield (value * (magnitude[place] / value.norm(dim=1)).unsqueeze(1)).to(dtype)
        return
    squares = sum(value.double().square().sum(0) for _, value in sums())  # an output's norm goes over all blocks
    factor = (magnitude.double() / squares.sqrt()).float()  # type: ignore[union-attr]
    for _, value in sums():
        yield (value * factor).to(dtype)


def merged_bias(adapter: Adapter, change: LowRank, base: Blocks, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A bias with the one that the adapter trained (``lora_bias``)."""
    more = change.scale * adapter.files.tensor(change.parts["bias"]).float()
    start = 0
    for block in base():
        yield (block.float() + more[start : start + len(block)]).to(dtype)
        start += len(block)
