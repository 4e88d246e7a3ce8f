"""Which rows of a batch begin alike, so that what they share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["LEAST", "MOST", "Group", "groups_of", "saved"]

LEAST = 1 / 16
"""The share of a batch's tokens that has to be saved: copying keys, values and queries costs about a fiftieth."""
MOST = 256
"""More rows than that are not looked at: it takes the host some twenty milliseconds, while the GPU waits."""
Tokens: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Rows that begin alike.

    Attributes:
        shared: the number of tokens that all of them begin with; 0 for a row by itself.
        rows: their numbers, in order.
    """

    shared: int
    rows: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed again."""
        return self.shared * (len(self.rows) - 1)


def groups_of(rows: Sequence[Tokens]) -> list[Group]:
    """Rows as groups of such as begin alike, by their first rows' order.

    In alphabetical order those that begin alike are neighbours. Neighbours that share most come together first; a group
    takes another in where that saves tokens, although what all of it shares may become shorter.

    Args:
        rows: the tokens of each, none of them empty.
    """
    # Numbers of one sign whose highest bytes come first are ordered as their bytes are.
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
    alike = [(_alike(rows[i], rows[j]), i, j) for i, j in pairwise(order)]
    group_of = {i: Group(0, (i,)) for i in order}
    for shared, i, j in sorted(alike, key=lambda found: -found[0]):
        if not shared:
            break
        one, other = group_of[i], group_of[j]
        lengths = [shared, *(group.shared for group in (one, other) if len(group.rows) > 1)]
        both = Group(min(lengths), tuple(sorted((*one.rows, *other.rows))))
        if both.saved > one.saved + other.saved:
            group_of |= dict.fromkeys(both.rows, both)
    return sorted(set(group_of.values()), key=lambda group: group.rows)


def saved(groups: Sequence[Group], tokens: int) -> float:
    """The share of so many tokens that groups save."""
    return sum(group.saved for group in groups) / max(tokens, 1)


def _alike(one: Tokens, other: Tokens) -> int:
    """With how many equal tokens two rows begin."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
