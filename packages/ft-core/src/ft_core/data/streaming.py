"""Packing without reading everything first: a window of a stream of rows at a time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ft_core.data.packing import Packed
from ft_core.data.tokenizing import RowTokenizer, Tokenized
from ft_core.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["PackedStream"]

READ = 32
"""Rows that are tokenized at once."""


class PackedStream(IterableDataset[dict[str, Any]]):
    """Rows of at most ``max_length`` tokens, packed from a stream of any length in memory for a window of it.

    A window is read until its documents fill ``window`` rows, packed best-fit-decreasing as
    :class:`ft_core.data.Packed` does it, and given in an order that the seed draws; then the next. A document is never
    cut to fill a row, and none is carried over: a window ends with about one row that is not full. What is given is a
    function of the arguments and the stream alone. The order of windows is the stream's: shuffle a stream that is
    sorted.

    Each item is a dict of ``input_ids``, ``labels`` and ``seq_lengths``, for :class:`ft_core.data.Collator`. This is an
    iterable data set of torch's, for which trainers want a number of steps. Of a DataLoader's n workers each gives
    every n-th row.

    ``state_dict()`` says after which row this is, in a few numbers; after ``load_state_dict()`` each pass begins there,
    until one has come to its end, and gives the rows that would have followed. The rows of the stream before that
    window are passed over, its own are packed again. It counts what has been taken from the last iterator, also by a
    loader that fetches ahead of the training. A DataLoader's workers iterate copies in their own processes, each with a
    place of its own: once they have begun, ``state_dict()`` refuses here. Take ``num_workers=0``, or a loader that asks
    each worker (torchdata's ``StatefulDataLoader``).

    Args:
        rows: rows in normal form, which can be gone through anew: a :class:`ft_core.data.RowStream`, a list, an
            iterable ``datasets`` data set in the same order each time.
        tokenizer: the model's tokenizer, with its chat template.
        max_length: the most tokens of a document and of a row.
        train_on: as for :func:`ft_core.data.tokenize_rows`.
        window: how many rows of tokens are packed at a time; some eight bytes a token.
        seed: draws the order within a window, anew for each epoch.

    Raises:
        TypeError: ``rows`` is an iterator, which can be gone through once only.
        DataError: an argument is out of range, a state is another stream's, or the place is a worker's; or, while it is
            iterated, a row cannot be rendered (with its number), or none of the stream's rows has a trained token.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on: Literal["answers", "all"] = "answers",
        window: int = 64,
        seed: int = 0,
    ) -> None:
        if isinstance(rows, Iterator):
            raise TypeError(
                "PackedStream: rows is an iterator; give what can be gone through again, such as a RowStream"
            )
        if window < 1:
            raise DataError(f"window must be at least 1 row, not {window}")
        self._rows, self._tokenize = rows, RowTokenizer(tokenizer, max_length, train_on)
        self._window, self._seed, self._epoch = window, seed, 0
        self._begin = self._now = (0, 0)
        self._in_workers = torch.zeros((), dtype=torch.bool).share_memory_()  # which they set, and this process sees

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not self._in_workers.is_shared():  # a copy; a worker that was spawned has the memory itself
            self._in_workers.share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, (start, given) = self._epoch, self._begin
        self._now = self._begin
        self._in_workers.fill_(worker is not None)
        source = enumerate(islice(self._rows, start, None), start)
        anything = bool(start or given)
        while (window := self._read(source)).rows:
            packed = Packed(window, self._tokenize.max_length)
            order = _shuffled(len(packed), f"{self._seed}:{epoch}:{start}")
            for place in range(given, len(order)):
                self._now = (start, place + 1)
                if place % workers == number:
                    yield packed[order[place]]
            anything |= len(packed) > 0
            start, given = start + window.rows, 0
        if not anything:
            raise DataError(
                f"none of the stream's {start} rows has a trained token within max_length {self._tokenize.max_length}"
            )
        self._begin = self._now = (0, 0)

    def _read(self, source: Iterator[tuple[int, Mapping[str, Any]]]) -> Tokenized:
        """The next window's documents; of no rows where the stream has ended."""
        window = Tokenized()
        while window.tokens < self._window * self._tokenize.max_length and (some := list(islice(source, READ))):
            self._tokenize(some, window)
        return window

    def dataset(self) -> datasets.IterableDataset:
        """The same as a ``datasets.IterableDataset``, which is what TRL's trainers take."""
        import datasets

        return datasets.IterableDataset.from_generator(self.__iter__)

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next, from 0: its rows are in an order of their own. Another than the last begins anew."""
        if epoch != self._epoch:
            self._epoch, self._begin, self._now = epoch, (0, 0), (0, 0)
            self._in_workers.fill_(False)

    def state_dict(self) -> dict[str, Any]:
        """Where the last iterator is, in values that JSON knows.

        Raises:
            DataError: it is in a DataLoader's workers.
        """
        if self._in_workers and get_worker_info() is None:
            raise DataError(
                "the stream's place is not known: the DataLoader's workers read it, each by itself; take num_workers=0"
            )
        start, given = self._now
        return {"epoch": self._epoch, "rows_before_window": start, "given_of_window": given, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let passes begin where a stream of the same rows and settings was.

        Raises:
            DataError: the settings differ, or the state is none of a stream.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise DataError(f"the stream's state is of {name} {state.get(name)!r}, this stream has {value!r}")
        try:
            place = int(state["rows_before_window"]), int(state["given_of_window"])
            self._epoch = int(state["epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no state of a stream: {error}") from error
        self._begin = self._now = place
        self._in_workers.fill_(False)

    def _settings(self) -> dict[str, Any]:
        settings = self._tokenize
        named = {"max_length": settings.max_length, "train_on": settings.train_on}
        return {**named, "window": self._window, "seed": self._seed}


def _shuffled(count: int, seed: str) -> list[int]:
    """``range(count)`` in an order of the seed's; Python promises ``random()`` across versions, not ``shuffle()``."""
    draw = random.Random(seed)
    keys = [draw.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
