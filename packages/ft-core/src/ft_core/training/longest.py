"""The longest batch of an epoch, found by the lengths of its rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch

__all__ = ["longest_batch", "tokens_in"]

Rows = Sequence[Sequence[int]]
"""The lengths of each row's sequences: its documents, or a pair's two answers."""

PROMPT = "prompt_length"
"""The column that says how many tokens of each of a row's sequences are the prompt's."""

log = logging.getLogger(__name__)


def tokens_in(inputs: Any) -> int:
    """Tokens of a batch, padding included; 0 where it has none that we know, as rows of prompts. Of recordings they are
    those that are written down."""
    if not isinstance(inputs, Mapping):
        return 0
    known = (("input_ids",), ("labels",)) if "input_features" in inputs else (("input_ids",),)
    names = next((found for found in known if found[0] in inputs), ("prompt_ids", "completion_ids"))
    parts = (inputs.get(name) for name in names)
    return sum(int(ids.numel()) for ids in parts if isinstance(ids, torch.Tensor))


def longest_batch(trainer: Any) -> dict[str, Any] | None:
    """The batch of the first epoch with the most tokens, padding included, as the trainer's collator makes it.

    Batches that the training ends before don't count.
    Only the lengths of the rows are read, and those rows that make the batch. The trainer's ``batch_tokens`` says how
    many tokens they become; where it does not know, the longest batches by each usual way of padding are made and
    compared. None for data whose rows cannot be counted before they are read: a stream, rows without token ids or made
    as they are read. Whatever fails here is logged, and None: a training does not depend on it.
    """
    try:
        return _longest(trainer)
    except Exception:
        log.debug("the longest batch is not tried: its rows cannot be counted", exc_info=True)
        return None


def _longest(trainer: Any) -> dict[str, Any] | None:
    if _streams(getattr(trainer, "train_dataset", None)):
        return None
    loader = trainer.get_train_dataloader()
    sampler, dataset = getattr(loader, "batch_sampler", None), loader.dataset
    if sampler is None or _streams(dataset):
        return None
    count = len(sampler)  # one without an end has none
    steps = getattr(trainer.args, "max_steps", 0)
    if steps > 0:  # the training ends before the others
        count = min(count, steps * trainer.args.gradient_accumulation_steps)
    rows = _rows(dataset, shared=bool(getattr(trainer, "shares_prompts", False)))
    if rows is None:
        return None
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    measures = _measures(trainer)
    best: list[tuple[int, list[int]]] = [(0, [])] * len(measures)
    for indices in islice(sampler, count):
        found = [rows[index] for index in indices]
        if not any(found):
            continue
        for place, measure in enumerate(measures):
            tokens = measure(found)
            if tokens > best[place][0]:
                best[place] = tokens, list(indices)
    chosen = {tuple(indices) for _, indices in best if indices}
    batches = (loader.collate_fn([dataset[index] for index in indices]) for indices in sorted(chosen))
    return max(batches, key=tokens_in, default=None)


def _measures(trainer: Any) -> tuple[Callable[[Rows], int], ...]:
    """How many tokens a batch of rows becomes; several where the trainer does not say."""
    known = getattr(trainer, "batch_tokens", None)
    if known is not None and known([1]) is not None:
        return (lambda rows: int(known(list(chain.from_iterable(rows)))),)
    return (_unpadded, _padded_sequences, _padded_rows)


def _unpadded(rows: Rows) -> int:
    return sum(map(sum, rows))


def _padded_sequences(rows: Rows) -> int:
    return sum(map(len, rows)) * max(chain.from_iterable(rows))


def _padded_rows(rows: Rows) -> int:
    return len(rows) * max(map(sum, rows))


def _streams(dataset: Any) -> bool:
    """Whether rows come one after the other, perhaps without end."""
    import datasets

    return isinstance(dataset, torch.utils.data.IterableDataset | datasets.IterableDataset)


def _rows(dataset: Any, shared: bool) -> Rows | None:
    """The lengths of each row's sequences, without decoding one.

    Of a pair whose prompt is computed once for both answers (``shared``), those of the prompt and of the answers alone.

    Those of a ``datasets.Dataset`` are in its columns, those of a list's rows at hand. Any other dataset may have them
    in an attribute ``lengths``, a number a row; its rows are not asked for theirs, which may be slow to make.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        columns = _columns(dataset)
        rows = list(_counted(dataset, columns)) if columns else None
        if rows and shared and len(columns) > 1 and PROMPT in dataset.column_names:
            return [[n, *(length - n for length in row)] for n, row in zip(dataset[PROMPT], rows, strict=True)]
        return rows
    if isinstance(dataset, list | tuple):
        return [list(row.get("seq_lengths") or [len(row["input_ids"])]) for row in dataset]
    lengths = getattr(dataset, "lengths", None)
    if lengths is None or callable(lengths) or len(lengths) != len(dataset):
        return None
    return [[int(length)] for length in lengths]


def _columns(dataset: Any) -> list[str]:
    """The columns of token ids, lists of whole numbers; none where a transform makes others of them.

    ``input_ids`` alone where there are any, else each that is called ``_ids``: a pair's answers.
    """
    if dataset.format["type"] == "custom":
        return []
    schema = dataset.features.arrow_schema
    if "input_ids" in schema.names:
        return ["input_ids"] if _is_list(schema.field("input_ids").type) else []
    return [name for name in schema.names if name.endswith("_ids") and _is_list(schema.field(name).type)]


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(is_one(kind) for is_one in lists) and types.is_integer(kind.value_type)


def _counted(dataset: Any, columns: list[str]) -> Iterator[list[int]]:
    """The lengths of each row's sequences: its documents where ``seq_lengths`` has them, else each column's."""
    import pyarrow.compute as pc

    schema = dataset.features.arrow_schema
    packed = columns == ["input_ids"] and "seq_lengths" in schema.names and _is_list(schema.field("seq_lengths").type)
    names = [*columns, "seq_lengths"] if packed else columns
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        each = [pc.fill_null(pc.list_value_length(table[name]), 0).to_pylist() for name in columns]
        whole = map(list, zip(*each, strict=True))
        if packed:
            yield from (
                documents or row for documents, row in zip(table["seq_lengths"].to_pylist(), whole, strict=True)
            )
        else:
            yield from whole
