"""The tensors of a merged model, each told how it is made when it is its turn to be written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from ft_export.checkpoints import Checkpoint, code_of
from ft_export.hearing import CODEC
from ft_export.merging.adapter import Adapter, LowRank, Replacement
from ft_export.merging.arithmetic import Blocks, merged_bias, merged_weight
from ft_export.merging.outline import Outline
from ft_export.writing import Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["merged_tensors"]


def merged_tensors(
    stored: Checkpoint,
    adapter: Adapter,
    outline: Outline,
    loosened: list[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The tensors of the merged model in the order of the base's files, then those that these do not have.

    Args:
        loosened: parameters that were tied and get a tensor of their own.
        device: where low-rank products are computed.
    """
    biases = adapter.biases()
    places = [(name, name) for name in stored if outline.has(name)]
    places += [(outline.aliases[name], name) for name in loosened]
    tensors = [_merged(stored, source, name, adapter, biases.get(name), dtype, device) for source, name in places]
    known = {*stored, *outline.aliases}
    for name, change in adapter.changes.items():
        if name not in known and isinstance(change, Replacement):
            tensors.append(_replaced(name, change, adapter, dtype))
    return tensors


def _merged(
    stored: Checkpoint,
    source: str,
    name: str,
    adapter: Adapter,
    bias: LowRank | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """A tensor of the base, ``source``, as what the adapter makes of the parameter ``name``."""
    change, key = adapter.changes.get(name), stored.key(name) if name == source else name
    was, shape = stored.dtype(source), stored.shape(source)
    to = dtype if was.is_floating_point and not name.startswith(CODEC) else was
    blocks: Blocks
    if isinstance(change, Replacement):
        return _replaced(key, change, adapter, to)
    if isinstance(change, LowRank):
        if "base" in change.parts:  # of a vocabulary that has grown
            shape = adapter.files.shape(change.parts["base"])
        blocks = partial(merged_weight, adapter, change, partial(_on, device, stored, source), shape, to)
    elif bias is not None:
        blocks = partial(merged_bias, adapter, bias, partial(stored.blocks, source), to)
    else:
        blocks = partial(_cast, partial(stored.blocks, source), to)
    return Tensor(key, code_of(to), shape, blocks)


def _replaced(key: str, change: Replacement, adapter: Adapter, dtype: torch.dtype) -> Tensor:
    blocks = partial(_cast, partial(adapter.files.blocks, change.key), dtype)
    return Tensor(key, code_of(dtype), adapter.files.shape(change.key), blocks)


def _on(device: torch.device | str, stored: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    for block in stored.blocks(name):
        yield block.to(device)


def _cast(blocks: Blocks, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for block in blocks():
        yield block.to(dtype)
