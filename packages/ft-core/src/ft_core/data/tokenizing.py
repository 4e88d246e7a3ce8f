"""Rows to token ids and labels, with the loss on the answers only unless all is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

from ft_core.console import counted
from ft_core.data.collating import IGNORE
from ft_core.data.rendering import Draft, Renderer
from ft_core.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowTokenizer", "Tokenized", "tokenize_rows"]

_BATCH = 512
"""Rows whose texts are given to the tokenizer at once."""


class Tokenized(Sequence[dict[str, list[int]]]):
    """Tokenized documents, each a dict of ``input_ids`` and ``labels`` of equal length; -100 is not trained.

    Held as flat 32-bit arrays: 8 bytes a token.

    Attributes:
        lengths: tokens of each document.
        row_of: for each document the index of the row that it comes from.
        rows: rows read.
        overlong: rows with a document longer than ``max_length``, which was cut off or, plain text, split.
        dropped: documents left out for want of a trained token: the prompt fills ``max_length``, or the text is empty.
        empty: those of them whose text is empty.
        pieces: documents that came from splitting overlong plain text.
        left_out: those of them that are too long and may not be cut.
        tokens: tokens in all.
        trained_tokens: labels that are not -100.
    """

    def __init__(self) -> None:
        self._ids, self._labels, self._starts = array("i"), array("i"), array("q", [0])
        self.lengths, self.row_of = array("i"), array("q")
        self.rows = self.overlong = self.dropped = self.empty = self.pieces = self.trained_tokens = 0
        self.left_out = 0

    @property
    def tokens(self) -> int:
        return len(self._ids)

    @property
    def input_ids(self) -> list[list[int]]:
        """The ids of every document, as lists."""
        return [document["input_ids"] for document in self]

    @property
    def labels(self) -> list[list[int]]:
        """The labels of every document, as lists."""
        return [document["labels"] for document in self]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = self._starts[index % len(self)]
        end = start + self.lengths[index]
        return {"input_ids": self._ids[start:end].tolist(), "labels": self._labels[start:end].tolist()}

    def dataset(self, documents: Sequence[Sequence[int]] | None = None) -> Dataset:
        """The documents as a ``datasets.Dataset``.

        Args:
            documents: for each row the documents to concatenate (see :class:`ft_core.data.Packed`); the column
                ``seq_lengths`` then holds their lengths. Without it each document is a row.
        """
        import datasets
        import numpy as np
        import pyarrow as pa

        ids, labels = np.frombuffer(self._ids, np.int32), np.frombuffer(self._labels, np.int32)
        if documents is None:
            offsets = np.frombuffer(self._starts, np.int64)
            return datasets.Dataset(pa.table({"input_ids": _lists(offsets, ids), "labels": _lists(offsets, labels)}))
        order = [index for row in documents for index in row]
        lengths = np.array([self.lengths[index] for index in order], np.int32)
        members = np.cumsum([0, *(len(row) for row in documents)])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[members]
        places = [slice(self._starts[index], self._starts[index] + self.lengths[index]) for index in order]
        columns = {
            "input_ids": _lists(offsets, np.concatenate([ids[place] for place in places])),
            "labels": _lists(offsets, np.concatenate([labels[place] for place in places])),
            "seq_lengths": _lists(members, lengths),
        }
        return datasets.Dataset(pa.table(columns))

    def append(self, ids: list[int], labels: list[int], row: int) -> bool:
        """Add a document that comes from the row of this index; whether it has a token to train on, without which it is
        dropped."""
        labels = [IGNORE, *labels[1:]]  # nothing precedes the first token, so it is never predicted
        trained = len(labels) - labels.count(IGNORE)
        if not trained:
            self.dropped += 1
            return False
        self._ids.extend(ids)
        self._labels.extend(labels)
        self._starts.append(len(self._ids))
        self.lengths.append(len(ids))
        self.row_of.append(row)
        self.trained_tokens += trained
        return True


def _lists(offsets: Any, values: Any) -> Any:
    import pyarrow as pa

    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, pa.int32()))


@dataclass(frozen=True)
class RowTokenizer:
    """Tokenizes some rows at a time; the arguments are those of :func:`tokenize_rows`.

    ``renderer`` writes the rows instead of the tokenizer's own :class:`Renderer`, where they hold more than text.

    Raises:
        DataError: ``max_length`` is below 2, or the tokenizer has no end-of-sequence token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train_on: Literal["answers", "all"] = "answers"
    renderer: Renderer | None = None
    _renderer: Renderer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(f"max_length must be at least 2, not {self.max_length}: a token is predicted from another")
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so the model could not learn to stop")
        object.__setattr__(self, "_renderer", self.renderer or Renderer(self.tokenizer))

    def __call__(self, numbered: Sequence[tuple[int, Mapping[str, Any]]], result: Tokenized) -> None:
        """Add the documents of rows in normal form, each with its number from 0, to what was tokenized before.

        Raises:
            DataError: a row cannot be rendered; with its number, counted from 1.
        """
        drafts = []
        for number, row in numbered:
            try:
                drafts.append(self._renderer.drafts(row))
            except DataError as error:
                raise DataError(f"row {number + 1}: {error}") from None
        each = [one for several in drafts for one in several]
        encoded = iter(_encode(each, self.tokenizer, self._renderer.special_ids))
        all_on = self.train_on == "all"
        hidden = [replace(one, spans=one.shown, mask=None, end=False) for one in each if one.shown and all_on]
        shown = iter(_encode(hidden, self.tokenizer, self._renderer.special_ids))
        for (number, _), several in zip(numbered, drafts, strict=True):
            result.rows += 1
            overlong = False
            for one in several:
                ids, mask = next(encoded)
                overlong |= len(ids) > self.max_length
                if all_on:
                    off = next(shown)[1] if one.shown else []
                    mask = [not number < len(off) or not off[number] for number in range(len(ids))]
                labels = [token if on else IGNORE for token, on in zip(ids, mask, strict=True)]
                if one.uncuttable and len(ids) > self.max_length:
                    result.left_out += 1
                    result.dropped += 1
                elif one.splittable and len(ids) > self.max_length:
                    for start in range(0, len(ids), self.max_length):
                        end = start + self.max_length
                        result.pieces += result.append(ids[start:end], labels[start:end], number)
                else:
                    result.append(ids[: self.max_length], labels[: self.max_length], number)
            result.dropped += not several
            result.empty += not several
            result.overlong += overlong


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: Literal["answers", "all"] = "answers",
) -> Tokenized:
    """Tokenize rows in normal form; see :meth:`ft_core.data.rendering.Renderer.drafts` for what is trained.

    The end-of-sequence token follows a completion and a text, and a conversation's trained turn that the template ends
    with no special token; it is trained. A document longer than ``max_length`` keeps its beginning, as in TRL, and is
    dropped where no trained token is left; plain text is split into pieces of ``max_length``, so that none is lost.

    Where a trained range does not begin between two tokens (a prompt "Paris is" and a completion "n't"), it begins, as
    in TRL, where the tokens of the text up to there and of the whole begin to differ.

    Args:
        rows: rows in normal form, such as :class:`ft_core.data.Rows`.
        tokenizer: the model's tokenizer, with its chat template.
        max_length: the most tokens that a document may have, at least 2.
        train_on: ``answers`` or ``all``, the prompts too.

    Raises:
        DataError: a row cannot be rendered (with its number), the tokenizer has no end-of-sequence token, or no
            document is left.
    """
    result, adding = Tokenized(), RowTokenizer(tokenizer, max_length, train_on)
    for numbered in _batches(enumerate(rows)):
        adding(numbered, result)
    if not len(result):
        empty = f", {result.empty} {'has' if result.empty == 1 else 'have'} an empty text" if result.empty else ""
        longer = f"{result.overlong} {'is' if result.overlong == 1 else 'are'} longer"
        raise DataError(
            f"none of {counted(result.rows, 'row')} has a trained token within max_length {max_length} "
            f"({longer}{empty}): raise max_length or look at the data"
        )
    return result


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _encode(
    drafts: list[Draft], tokenizer: PreTrainedTokenizerBase, special: frozenset[int]
) -> list[tuple[list[int], list[bool]]]:
    """Ids and, for each, whether it is trained."""
    if not drafts:
        return []
    cuts = [[0, *(edge for span in one.spans for edge in span), len(one.text)] for one in drafts]
    texts = [one.text for one in drafts]
    for one, edges in zip(drafts, cuts, strict=True):
        texts.extend(one.text[a:b] for a, b in pairwise(edges))
    ids = _tokens(texts, tokenizer)
    result = []
    at = len(drafts)
    for one, edges, whole in zip(drafts, cuts, ids, strict=False):
        parts = ids[at : at + len(edges) - 1]
        at += len(edges) - 1
        mask = _mask(one, edges, whole, parts, tokenizer)
        end = one.end or (one.spans and edges[-2] == edges[-1] and whole and mask[-1] and whole[-1] not in special)
        if end and whole[-1:] != [tokenizer.eos_token_id]:
            whole, mask = [*whole, tokenizer.eos_token_id], [*mask, True]
        result.append((whole, mask))
    return result


def _mask(
    one: Draft, edges: list[int], whole: list[int], parts: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Which tokens lie in the spans. The parts between the spans' edges are every other one trained."""
    if one.mask is not None:
        return [bool(on) for on in one.mask]
    if [token for part in parts for token in part] == whole:  # every edge lies between two tokens
        return [bool(number % 2) for number, part in enumerate(parts) for _ in part]
    mask = [False] * len(whole)
    prefixes = iter(_tokens([one.text[:edge] for span in one.spans for edge in span], tokenizer))
    for _ in one.spans:
        start, end = _shared(next(prefixes), whole), _shared(next(prefixes), whole)
        mask[start:end] = [True] * (end - start)
    return mask


def _shared(one: list[int], other: list[int]) -> int:
    """How many leading tokens two lists share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids
