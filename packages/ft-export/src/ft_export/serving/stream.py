"""Writing safetensors files piece by piece, so that no more than one tensor is ever held."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ft_export.checkpoints import code_of
from ft_export.errors import ExportError
from ft_export.writing import bytes_of, header_of

if TYPE_CHECKING:
    import torch

__all__ = ["Planned", "write_tensors"]


@dataclass(frozen=True)
class Planned:
    """A tensor that a file will hold.

    Attributes:
        shape: its sizes.
        dtype: its type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, planned: Mapping[str, Planned], tensors: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Write one safetensors file whose header is known before its tensors are.

    Args:
        planned: what the file holds, in the order of its bytes.
        tensors: the tensors in the same order, a few at a time; each group is let go before the next is asked for.

    Raises:
        ExportError: the tensors are not those planned. OSError: the disk is full.
    """
    header = header_of((name, code_of(plan.dtype), plan.shape, plan.bytes) for name, plan in planned.items())
    left = list(planned.items())[::-1]
    with path.open("wb") as file:
        file.write(header)
        for group in tensors:
            for name, tensor in group.items():
                if not left or left.pop() != (name, Planned(tuple(tensor.shape), tensor.dtype)):
                    raise ExportError(f"{path}: tensor {name} is not what was planned there: a fault of ft-export")
                file.write(bytes_of(tensor))
        if left:
            raise ExportError(f"{path}: not all planned tensors came: a fault of ft-export")
        file.flush()
        os.fsync(file.fileno())
