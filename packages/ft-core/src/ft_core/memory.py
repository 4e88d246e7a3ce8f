"""Amounts of memory as people write them; running out of it, told from other errors and said in one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ft_core.errors import RunError

__all__ = ["StillOutOfMemory", "bytes_of", "enough_memory", "is_memory_error", "let_segments_grow"]

WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""torch has a class for a full GPU only; a full host, Apple's GPU and a library's own memory are told by the text."""


UNITS = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}


def bytes_of(text: str) -> int:
    """An amount such as ``12GiB``, ``12.5 GB`` or ``800MiB`` in bytes.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    count = int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0
    if not count:
        raise ValueError("auto, or an amount such as 12GiB (units: GiB, MiB, GB, MB)")
    return count


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where torch reads how its allocator is to work, once for a process."""


def let_segments_grow() -> None:
    """Have torch leave no gaps between large tensors, unless somebody has set its allocator.

    For a program's beginning, before torch is imported; it changes the environment.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


class StillOutOfMemory(MemoryError):
    """A step that does not fit by a tighter plan either; the text is that plan."""


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that the GPU or the host has no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


@contextmanager
def enough_memory(doing: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into one line.

    Args:
        doing: what the memory is needed for, such as ``answering 8 prompts``.
        advice: what to do about it.

    Raises:
        RunError: the body ran out of the GPU's memory, or of this computer's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise RunError(f"{doing} takes more memory than is free: {advice}") from error
