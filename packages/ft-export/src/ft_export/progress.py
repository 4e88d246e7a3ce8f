"""How work that takes minutes says how far it is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "counting", "silent"]

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what): a total of 0 says that something without parts begins, such as loading a model."""


def silent(done: int, total: int, what: str) -> None:
    """Says nothing."""


def counting(progress: Progress, total: int, what: str) -> Callable[[], None]:
    """To be called after each of ``total`` parts of ``what``, which begins now."""
    done = 0
    progress(done, total, what)

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, total, what)

    return count
