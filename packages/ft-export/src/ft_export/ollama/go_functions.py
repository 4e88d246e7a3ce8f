"""The functions of Go's templates that are read here, as strict about what they take as Go or stricter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ft_export.ollama.go_tokens import GoTemplateError

__all__ = ["FUNCTIONS", "truth"]


def truth(value: Any) -> bool:
    return True if isinstance(value, dict) else bool(value)


def _equal(one: Any, *others: Any) -> bool:
    for other in others:
        if type(one) is not type(other) or not isinstance(one, str | int):
            raise GoTemplateError("eq compares values of different or other types than text and numbers")
    if not others:
        raise GoTemplateError("eq takes two values or more")
    return one in others


def _number(name: str, compare: Callable[[int, int], bool]) -> Callable[..., bool]:
    def function(*given: Any) -> bool:
        if len(given) != 2 or any(type(value) is not int for value in given):
            raise GoTemplateError(f"{name} compares two whole numbers here")
        return compare(*given)

    return function


def _length(*given: Any) -> int:
    if len(given) != 1 or not isinstance(given[0], str | list):
        raise GoTemplateError("len takes a text or a list")
    return len(given[0].encode()) if isinstance(given[0], str) else len(given[0])


def _slice(*given: Any) -> list[Any]:
    items, *bounds = given or (None,)
    if not isinstance(items, list) or not 1 <= len(bounds) <= 2 or any(type(at) is not int for at in bounds):
        raise GoTemplateError("slice takes a list and one or two whole numbers here")
    start, end = bounds if len(bounds) == 2 else (bounds[0], len(items))
    if not 0 <= start <= end <= len(items):
        raise GoTemplateError("slice reaches beyond the list")
    return items[start:end]


def _not(*given: Any) -> bool:
    if len(given) != 1:
        raise GoTemplateError("not takes one value")
    return not truth(given[0])


def _not_equal(*given: Any) -> bool:
    if len(given) != 2:
        raise GoTemplateError("ne takes two values")
    return not _equal(*given)


FUNCTIONS: dict[str, Callable[..., Any] | None] = {
    "and": None,  # and, or: the last value that had to be looked at
    "or": None,
    "not": _not,
    "eq": _equal,
    "ne": _not_equal,
    "lt": _number("lt", lambda a, b: a < b),
    "le": _number("le", lambda a, b: a <= b),
    "gt": _number("gt", lambda a, b: a > b),
    "ge": _number("ge", lambda a, b: a >= b),
    "len": _length,
    "slice": _slice,
}
"""The functions that are read here."""
