"""Types of command-line arguments: a value that makes no sense is refused before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["count", "count_or_none", "share", "temperature"]


def count(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1)


def count_or_none(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0 and up to 1")


def temperature(text: str) -> float:
    """A number from 0."""
    return _number(text, lambda value: 0 <= value < math.inf, "a number from 0")


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed (allowed: a whole number from {least})")
    return int(text)


def _number(text: str, fits: Callable[[float], bool], allowed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed (allowed: {allowed})")
    return value
