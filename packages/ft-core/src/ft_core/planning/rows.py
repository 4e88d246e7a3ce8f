"""How many optimizer steps a configuration's data makes, as far as that can be told without reading it whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ft_core.config import TrainConfig
from ft_core.console import counted
from ft_core.data.files import EXTENSIONS, read_file
from ft_core.errors import DataError

__all__ = ["Count", "count_rows", "steps_of"]

COUNTED = 2**28
"""Bytes of data up to which rows are counted: a second or so."""
PARSED = 2**25
"""Bytes up to which a file whose rows are no lines is parsed for it."""
LETTERS = 4
"""Bytes of text to a token, about: for English and a vocabulary of 100,000."""


@dataclass(frozen=True)
class Count:
    """Of the training data: rows, and bytes of its files."""

    rows: int
    bytes: int


def count_rows(config: TrainConfig) -> Count | None:
    """Rows to train on, held-out ones left out; None for data that is on the Hub, too large, or not to be read.

    What is wrong with the data is said when it is read for training, not here.
    """
    rows, size = 0.0, 0
    sources = [(config.data, 1.0)] if isinstance(config.data, str) else [(s.path, s.weight or 1.0) for s in config.data]
    for name, weight in sources:
        path = Path(name).expanduser()
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        for file in files:
            count = _rows_of(file)
            if count is None:
                return None
            rows += count * weight
            size += int(file.stat().st_size * weight)
    if config.eval_split is not None and rows:
        held = config.eval_split * rows if config.eval_split < 1 else float(config.eval_split)
        size = int(size * max(rows - held, 0.0) / rows)
        rows = max(rows - held, 0.0)
    return Count(int(rows), size) if rows else None


def _rows_of(file: Path) -> int | None:
    if not file.is_file() or file.suffix.lower() not in EXTENSIONS:
        return None
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        except Exception:  # no parquet file, whatever its name says
            return None
    size = file.stat().st_size
    if file.suffix.lower() == ".jsonl":
        if size > COUNTED:
            return None
        with open(file, "rb") as stream:
            return sum(1 for line in stream if line.strip())
    if size > PARSED:
        return None
    try:
        return sum(1 for _ in read_file(file))
    except DataError:
        return None


def steps_of(
    config: TrainConfig, count: Count | None, row_tokens: float | None = None, text: bool = True
) -> tuple[int | None, str]:
    """Optimizer steps of the run, None if unknown; and how they were counted.

    Args:
        row_tokens: of a row, the mean, where that is known. text: whether else a row's bytes are those of its text.
    """
    training = config.training
    if training.max_steps is not None:
        return training.max_steps, "training.max_steps"
    if count is None:
        names = [config.data] if isinstance(config.data, str) else [source.path for source in config.data]
        local = [name for name in names if Path(name).suffix.lower() in EXTENSIONS]
        gone = [name for name in local if not Path(name).expanduser().exists()]
        return None, f"{gone[0]} is not there" if gone else "the rows of the data are not counted here"
    batch = training.batch_size
    if config.packing and row_tokens is not None:
        packed = max(math.ceil(count.rows * row_tokens / config.max_length), 1)
        said = f"{counted(count.rows, 'row')} packed into about {packed:,}, at {row_tokens:.0f} tokens each"
    elif config.packing and not text:
        return None, "the tokens of the data's images are not counted here"
    elif config.packing:
        packed = max(math.ceil(count.bytes / LETTERS / config.max_length), 1)
        said = f"{counted(count.rows, 'row')} packed into about {packed:,}, at {LETTERS} bytes a token"
    else:
        packed, said = count.rows, counted(count.rows, "row")
    each = math.ceil(math.ceil(packed / batch) / training.gradient_accumulation)
    epochs = f"{training.epochs:g} epoch{'' if training.epochs == 1 else 's'}"
    return math.ceil(each * training.epochs), f"{epochs} of {said}"
