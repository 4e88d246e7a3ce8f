"""Training data: formats, reading, splitting, tokenizing with masked labels, packing and batching."""

from ft_core.data.collating import Collator, keeps_documents_apart
from ft_core.data.formats import FORMATS, Format, recognise
from ft_core.data.packing import Packed, pack
from ft_core.data.reading import read_rows
from ft_core.data.rendering import render_prompt
from ft_core.data.rows import Rows, split
from ft_core.data.tokenizing import Tokenized, tokenize_rows

__all__ = [
    "FORMATS",
    "Collator",
    "Format",
    "Packed",
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
