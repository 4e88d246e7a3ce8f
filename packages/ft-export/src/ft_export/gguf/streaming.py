"""A tensor's way into a GGUF file in blocks: while one is hashed and written, both at once, the next is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.writing import ahead

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["BLOCK", "Stream", "is_finite", "rows_of"]

BLOCK = 1 << 24
"""Values of a block, about."""


class Stream:
    """What stands for an array in ``GGUFWriter.write_tensor_data``: its size is known, its blocks are made meanwhile.

    Attributes:
        nbytes: of all blocks together.
        sha256: of the bytes that were written.
    """

    def __init__(self, blocks: Iterable[np.ndarray[Any, Any]], nbytes: int) -> None:
        self.nbytes, self._blocks = nbytes, blocks
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def tofile(self, file: IO[bytes]) -> None:
        """Write all blocks, once.

        Raises:
            ExportError: they are not ``nbytes`` together.
        """
        written = 0
        with ThreadPoolExecutor(1) as thread:
            for block in ahead(self._blocks):
                data = memoryview(block).cast("B")
                hashed = thread.submit(self._digest.update, data)
                file.write(data)
                written += len(data)
                hashed.result()
        if written != self.nbytes:
            raise ExportError(f"a tensor was to have {self.nbytes} bytes and has {written}")


def rows_of(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in blocks along its first dimension, of about ``BLOCK`` values each."""
    rows = max(1, BLOCK * len(value) // max(value.numel(), 1)) if value.dim() > 1 else max(len(value), 1)
    yield from value.split(rows)


def is_finite(value: torch.Tensor) -> bool:
    """Whether all values are; by the smallest and the largest, which are NaN if one value is (ten times as fast)."""
    import torch

    return value.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())
