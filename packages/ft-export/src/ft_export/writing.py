"""Writing safetensors files tensor by tensor, in blocks of rows: a model's weights are never in memory together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.checkpoints import CODES
from ft_export.errors import ExportError
from ft_export.progress import Progress, silent

if TYPE_CHECKING:
    import torch

__all__ = ["SHARD", "Tensor", "ahead", "bytes_of", "header_of", "shards_of", "write_model"]

SHARD = 5_000_000_000
"""Bytes of a file, unless one tensor alone has more."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is to be written.

    Attributes:
        name: in the file. dtype: as safetensors calls it (``BF16``).
        blocks: makes its values in order, as blocks along the first dimension, when it is its turn.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return math.prod(self.shape) * CODES[self.dtype].itemsize


def shards_of(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in their order, cut into files of at most ``SHARD`` bytes where no single one is larger."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = SHARD
        shards[-1].append(tensor)
        room -= tensor.bytes
    return shards


def write_model(folder: Path, tensors: Sequence[Tensor], progress: Progress = silent) -> list[Path]:
    """Write ``model.safetensors``, or several files and their index, as transformers names them.

    A file that is there already, as long as it is to be, is not written again: the folder is one that an interrupted
    process has left (:func:`ft_export.folders.new_folder`). Each is written beside its place and renamed.

    Args:
        progress: see :data:`ft_export.progress.Progress`; a part is a tensor.

    Raises:
        ExportError: blocks do not add up to what their tensor was said to be. OSError: as the system says it.
    """
    shards = shards_of(tensors)
    several, done = len(shards) > 1, 0
    files: list[Path] = []
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if several else "model.safetensors"
        files.append(folder / name)
        header = header_of((tensor.name, tensor.dtype, tensor.shape, tensor.bytes) for tensor in shard)
        if files[-1].is_file() and files[-1].stat().st_size == len(header) + sum(tensor.bytes for tensor in shard):
            done += len(shard)
            progress(done, len(tensors), "tensors written")
        else:
            beside = files[-1].with_suffix(".unfinished")
            for _ in _write(beside, header, shard):
                done += 1
                progress(done, len(tensors), "tensors written")
            os.replace(beside, files[-1])
        places |= {tensor.name: name for tensor in shard}
    if several:
        total = sum(tensor.bytes for tensor in tensors)
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return files


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """A safetensors file's beginning, which says where each tensor lies.

    Args:
        tensors: of each its name, the code of its type, its shape and its bytes, in the file's order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, code, shape, size in tensors:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each of which is made in another thread while the one before is used."""
    source = iter(items)
    nothing = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, nothing)
        while (item := coming.result()) is not nothing:
            coming = thread.submit(next, source, nothing)
            yield item


def _write(path: Path, header: bytes, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Write one file; yields each tensor that is in it."""
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            written = sum(file.write(_bytes(block, tensor)) for block in ahead(tensor.blocks()))
            if written != tensor.bytes:
                raise ExportError(f"{tensor.name} was to have {tensor.bytes} bytes and has {written}")
            yield tensor
        file.flush()
        os.fsync(file.fileno())


def _bytes(block: torch.Tensor, tensor: Tensor) -> memoryview:
    import torch

    if block.dtype != getattr(torch, CODES[tensor.dtype].name):
        raise ExportError(f"{tensor.name} was to be {CODES[tensor.dtype].name} and is {block.dtype}")
    return bytes_of(block)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in order; numpy has no bfloat16 and no float8, so they go as bytes."""
    import torch

    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
