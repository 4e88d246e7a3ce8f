"""Several documents in one training row, so that no position is spent on padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from ft_core.data.tokenizing import Tokenized

__all__ = ["Packed", "pack"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing (Johnson, "Near-optimal bin packing algorithms", 1973).

    Documents are placed longest first, each into the row whose remaining space it fits best; equal lengths in their
    order, so the result is a function of the arguments alone. O(n log n) comparisons for n documents: the rows are
    found by bisection among the distinct remaining spaces.

    Args:
        lengths: tokens of each document, each from 1 to ``capacity``.
        capacity: tokens of a row.

    Returns:
        the rows, each a rising list of indices into ``lengths``. Every index occurs once.

    Raises:
        ValueError: a length is below 1 or above the capacity.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # remaining space -> rows that have it
    spaces: list[int] = []  # the keys of open_rows, rising
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"document {index} has {length} tokens; a row takes 1 to {capacity}")
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(index)
        left = space - length
        if left:
            if left not in open_rows:
                insort(spaces, left)
                open_rows[left] = []
            open_rows[left].append(row)
    for members in rows:
        members.sort()
    return rows


class Packed(Sequence[dict[str, Any]]):
    """Tokenized documents packed into rows of at most ``capacity`` tokens.

    Row i is a dict of ``input_ids`` and ``labels``, each the concatenation of the row's documents, and
    ``seq_lengths``, the documents' lengths in order (TRL's name for them), which :class:`ft_core.data.Collator` turns
    into position ids that restart at each document.

    Attributes:
        documents: for each row, the indices of its documents.
        capacity: tokens that a row may have.
    """

    def __init__(self, tokenized: Tokenized, capacity: int) -> None:
        self.capacity = capacity
        self.documents = pack(tokenized.lengths, capacity)
        self._tokenized = tokenized

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        parts = [self._tokenized[i] for i in self.documents[index]]
        return {
            "input_ids": [token for part in parts for token in part["input_ids"]],
            "labels": [label for part in parts for label in part["labels"]],
            "seq_lengths": [len(part["input_ids"]) for part in parts],
        }

    @property
    def fill(self) -> float:
        """The share of the rows' capacity that holds tokens, from 0 to 1."""
        return sum(self._tokenized.lengths) / (self.capacity * len(self)) if len(self) else 0.0

    def dataset(self) -> Dataset:
        """The rows as a ``datasets.Dataset`` with the columns ``input_ids``, ``labels`` and ``seq_lengths``."""
        return self._tokenized.dataset(self.documents)
