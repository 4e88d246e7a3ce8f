"""The merged values of a weight, in fp32, block by block: no more than a block of a weight is ever in memory.

This is the making side: what it makes is checked in float64 by ``ft_export.merging.weights_check`` and in PEFT's own
arithmetic by ``ft_export.merging.logprobs_check``. The formulas are those of ``ft_export.merging.adapter``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.merging.adapter import Adapter, LowRank

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "Blocks", "device_of", "exact_products", "merged_bias", "merged_weight"]

DEVICES = ("cpu", "cuda", "auto")
Blocks = Callable[[], Iterable["torch.Tensor"]]
"""Makes a tensor's blocks of rows, in order; it may be called several times."""


def device_of(name: str) -> str:
    """Where ``--device`` says that products are computed: ``cpu`` or ``cuda``.

    Raises:
        ExportError: it is not known, or no CUDA device is there.
    """
    import torch

    if name not in DEVICES:
        raise ExportError(f"--device {name!r} is not known (allowed: {', '.join(DEVICES)})")
    there = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ExportError("--device cuda: torch finds no CUDA device here; leave it out, or pass --device auto")
    return "cuda" if there else "cpu"


@contextmanager
def exact_products() -> Iterator[None]:
    """Let a GPU multiply fp32 numbers as such, whatever the process asked for: TF32 has three digits.

    torch has two ways to say it and refuses to multiply where they differ, or to tell the older one where the newer was
    used. Both are as they were when the block ends.
    """
    import torch

    products: Any = torch.backends.cuda.matmul
    newer, older = products.fp32_precision, None
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        products.fp32_precision = newer


def merged_weight(
    adapter: Adapter, change: LowRank, base: Blocks, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The base's weight with its low-rank product, and DoRA's norm, in blocks of the rows as they are stored.

    It is computed where the base's blocks are; on a GPU within :func:`exact_products`.

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
        key, like = change.parts["base"], next(iter(base()))
        base = lambda: (block.to(like.device, like.dtype) for block in adapter.files.blocks(key))  # noqa: E731

    def sums() -> Iterator[tuple[slice, torch.Tensor]]:
        nonlocal rows, columns
        start = 0
        for block in base():
            rows, columns = rows.to(block.device), columns.to(block.device)  # once: then they are there
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
            magnitude = magnitude.to(value.device)
            yield (value * (magnitude[place] / value.norm(dim=1)).unsqueeze(1)).to(dtype)
        return
    squares = sum(value.double().square().sum(0) for _, value in sums())  # an output's norm goes over all blocks
    factor = (magnitude.to(squares.device).double() / squares.sqrt()).float()  # type: ignore[union-attr]
    for _, value in sums():
        yield (value * factor).to(dtype)


def merged_bias(adapter: Adapter, change: LowRank, base: Blocks, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A bias with the one that the adapter trained (``lora_bias``)."""
    more = change.scale * adapter.files.tensor(change.parts["bias"]).float()
    start = 0
    for block in base():
        yield (block.float() + more[start : start + len(block)]).to(dtype)
        start += len(block)
