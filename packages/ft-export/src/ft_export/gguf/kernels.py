"""llama.cpp's own rounding, called in the library that xllamacpp carries: not one bit of it is ours."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["quantize"]

PIECE = 2**16
"""Values that a thread rounds at a time, about: a few milliseconds, so that no thread waits long for another's last."""


def quantize(value: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The bytes of a tensor in blocks.

    Rows are rounded by themselves, so several threads do it, and the result does not depend on how many.

    Args:
        value: float32, rows last, contiguous. kind: ggml's name of the type, such as ``Q4_K``.

    Returns:
        uint8 of the same shape, with the bytes of a row in place of its values.

    Raises:
        ExportError: xllamacpp is not installed, or its library has no such function.
    """
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    width = value.shape[-1]
    rows = value.reshape(-1, width)
    made = np.empty((rows.shape[0], width // block * size), dtype=np.uint8)
    chunk = _library().ggml_quantize_chunk
    step = max(PIECE // width, 1)

    def piece(first: int) -> None:
        count = min(step, rows.shape[0] - first)
        source, target = rows[first : first + count], made[first : first + count]
        written = chunk(int(number), source.ctypes.data, target.ctypes.data, 0, count, width, None)
        if written != target.nbytes:
            raise ExportError(f"llama.cpp wrote {written} bytes of {kind} where {target.nbytes} belong")

    with ThreadPoolExecutor(_processors()) as threads:
        list(threads.map(piece, range(0, rows.shape[0], step)))
    shaped: np.ndarray[Any, Any] = made.reshape(*value.shape[:-1], made.shape[-1])
    return shaped


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _library() -> ctypes.CDLL:
    from importlib.util import find_spec

    found = find_spec("xllamacpp.xllamacpp") if find_spec("xllamacpp") is not None else None
    if found is None or found.origin is None:
        raise ExportError("rounding to this type needs llama.cpp: pip install gguf xllamacpp")
    library = ctypes.CDLL(found.origin)
    try:
        function = library.ggml_quantize_chunk
    except AttributeError as error:
        raise ExportError(f"{found.origin} has no ggml_quantize_chunk: install another version of xllamacpp") from error
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library
