"""The rows of a data set in their normal form, small in memory, and how they are split."""

from __future__ import annotations

import json
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from ft_core.errors import DataError

__all__ = ["Rows", "shared", "split"]


class Rows(Sequence[dict[str, Any]]):
    """A list of rows in normal form; each is decoded when it is asked for.

    Rows are held as UTF-8 JSON, one ``bytes`` object a distinct row, and the sequence is an array of indices into them.
    So a million rows cost their text and some 50 bytes each, a row that is repeated by a weight costs 8 bytes, the
    forms may differ from row to row (which a columnar table would not allow), and nothing is written to a cache.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._encoded: list[bytes] = []
        self._order = array("q")
        self.add(rows)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, which must be in a normal form."""
        for row in rows:
            self._order.append(len(self._encoded))
            self._encoded.append(encode(row))

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at these indices, in this order; an index may occur more than once."""
        chosen = Rows()
        chosen._encoded = self._encoded  # never changed in place, so it can be shared
        chosen._order = array("q", (self._order[i] for i in indices))
        return chosen

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        row: dict[str, Any] = json.loads(self._encoded[self._order[index]])
        return row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for at in self._order:
            yield json.loads(self._encoded[at])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return len(self) == len(other) and all(self._bytes(i) == other._bytes(i) for i in range(len(self)))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)})"

    def _bytes(self, index: int) -> bytes:
        return self._encoded[self._order[index]]

    @classmethod
    def of_encoded(cls, encoded: Iterable[bytes]) -> Rows:
        """Rows that :func:`encode` made."""
        rows = cls()
        rows._encoded.extend(encoded)
        rows._order.extend(range(len(rows._encoded)))
        return rows

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """The rows of several, one after the other."""
        whole = cls()
        for part in parts:
            start = len(whole._encoded)
            whole._encoded.extend(part._encoded)
            whole._order.extend(start + at for at in part._order)
        return whole

    def weighted(self, weight: float, *, seed: int | str) -> Rows:
        """Each row ``weight`` times on average: whole copies of all, and of the fraction a share drawn by the seed.

        The copies of a row stand side by side; a trainer shuffles.
        """
        copies, fraction = int(weight), weight - int(weight)
        extra = set(_drawn(len(self), round(fraction * len(self)), seed))
        return self.select(i for i in range(len(self)) for _ in range(copies + (i in extra)))


def shared(train: Rows, held_out: Rows) -> int:
    """How many of the held-out rows are trained on too, word for word, whatever their files are called."""
    wanted = {held_out._bytes(i) for i in range(len(held_out))}
    found = {row for row in train._encoded if row in wanted}
    if found and len(train) < len(train._encoded):  # a selection, which need not have all that it selects from
        found = {row for i in range(len(train)) if (row := train._bytes(i)) in wanted}
    return sum(held_out._bytes(i) in found for i in range(len(held_out)))


def encode(row: Mapping[str, Any]) -> bytes:
    """A row as UTF-8 JSON.

    Raises:
        DataError: a string holds half of a surrogate pair, which is no Unicode text.
    """
    try:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"holds half of a surrogate pair ({error.object[error.start]!r}), which is no text") from error
    except TypeError as error:
        raise DataError(f"holds a value that JSON cannot express: {error}") from error


def split(rows: Rows, eval_split: float | int, *, seed: int) -> tuple[Rows, Rows]:
    """Divide rows into those to train on and those held out, by the seed alone.

    Equal rows stay on one side, so that no row held out is also trained on: what is drawn are distinct rows. The
    held-out side has each once; the training side keeps its copies. Both keep the rows' order.

    Args:
        rows: the rows.
        eval_split: a share between 0 and 1, of which at least one row comes, or a whole number of rows; both count
            distinct rows.
        seed: draws the rows.

    Raises:
        DataError: the value is no share and no count, or one side would be empty.
    """
    first: dict[bytes, int] = {}
    groups = [first.setdefault(rows._bytes(i), len(first)) for i in range(len(rows))]
    distinct = len(first)
    if isinstance(eval_split, bool) or not isinstance(eval_split, (int, float)) or not math.isfinite(eval_split):
        raise DataError(f"eval_split must be a share between 0 and 1 or a whole number of rows, not {eval_split!r}")
    if not (0 < eval_split < 1 or eval_split == int(eval_split) >= 1):
        raise DataError(f"eval_split must be a share between 0 and 1 or a whole number of rows, not {eval_split}")
    count = max(1, round(eval_split * distinct)) if eval_split < 1 else int(eval_split)
    if not 1 <= count < distinct:
        raise DataError(
            f"eval_split {eval_split} of {distinct} distinct rows would hold out {count} and train on "
            f"{distinct - count}; both sides need at least one row (a .txt file is one row)"
        )
    drawn = set(_drawn(distinct, count, f"{seed}:split"))
    seen: set[int] = set()
    train: list[int] = []
    held_out: list[int] = []
    for index, group in enumerate(groups):
        if group not in drawn:
            train.append(index)
        elif group not in seen:
            seen.add(group)
            held_out.append(index)
    return rows.select(train), rows.select(held_out)


def _drawn(total: int, count: int, seed: int | str) -> list[int]:
    """``count`` of ``range(total)`` without replacement. Python promises ``random()``'s sequence across versions, not
    ``sample()``'s."""
    generator = random.Random(str(seed))
    keys = [generator.random() for _ in range(total)]
    return sorted(range(total), key=keys.__getitem__)[:count]
