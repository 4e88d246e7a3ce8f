"""Training data: formats, reading, splitting, tokenizing with masked labels, packing and batching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ft_core.data.collating import Collator, keeps_documents_apart
from ft_core.data.formats import FORMATS, Format, recognise
from ft_core.data.packing import Packed, pack
from ft_core.data.reading import RowStream, read_rows
from ft_core.data.rendering import render_prompt
from ft_core.data.rows import Rows, split
from ft_core.data.tokenizing import Tokenized, tokenize_rows

if TYPE_CHECKING:
    from ft_core.data.streaming import PackedStream

__all__ = [
    "FORMATS",
    "Collator",
    "Format",
    "Packed",
    "PackedStream",
    "RowStream",
    "Rows",
    "Tokenized",
    "keeps_documents_apart",
    "pack",
    "read_rows",
    "recognise",
    "render_prompt",
    "split",
    "tokenize_rows",
]


def __getattr__(name: str) -> Any:
    if name == "PackedStream":  # its class derives from one of torch, which is not imported before it is used
        from ft_core.data import streaming

        return streaming.PackedStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
