"""Numbers as people read them: units, thousands, a real minus sign, no more digits than mean something."""

from __future__ import annotations

import math
from datetime import UTC, datetime

__all__ = ["DASH", "MINUS", "SPACE", "compact", "count", "date", "duration", "memory", "percent", "plain"]

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
"""Stands for a number or text that is not there."""

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def _odd(value: float) -> str | None:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    return None


def _sign(text: str) -> str:
    return text.replace("-", MINUS)


def plain(value: float, digits: int = 4) -> str:
    """A number to ``digits`` significant digits: 0.0204, 22.2, 1,234,567, 5e−5."""
    if odd := _odd(value):
        return odd
    if value == 0:
        return "0"
    size = abs(float(f"{value:.{digits - 1}e}"))
    if size >= 1e9 or size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return _sign(f"{mantissa}e{int(exponent)}")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return _sign(text.rstrip("0").rstrip(".") if "." in text else text)


def count(value: float) -> str:
    """A whole number with thousands separated: 74,880."""
    return _odd(value) or _sign(f"{round(value):,}")


def compact(value: float) -> str:
    """A large number in thousands, millions or billions: 134.5 M, 8.03 B; under 10,000 as it is."""
    if odd := _odd(value):
        return odd
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{plain(value / (1e3 if unit == 'k' else size), 4 if unit == 'M' else 3)}{SPACE}{unit}"
    return plain(value)


def percent(share: float) -> str:
    """A share from 0 to 1 in percent: 98 %, 3.5 %. Never rounded up to 100 % or down to 0 %."""
    if odd := _odd(share):
        return odd
    value = share * 100
    text = f"{value:.1f}"
    if text == "100.0" and value < 100:
        text = "> 99.9"
    elif text == "0.0" and value > 0:
        text = "< 0.1"
    return f"{_sign(text.removesuffix('.0'))}{SPACE}%"


def memory(size: float) -> str:
    """Bytes in binary units: 2.61 GiB, 858 MiB."""
    if odd := _odd(size):
        return odd
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(size) >= 2**power:
            return f"{plain(size / 2**power, 3)}{SPACE}{unit}"
    return f"{count(size)}{SPACE}B"


def duration(seconds: float) -> str:
    """A length of time: 0.8 s, 42 s, 4 min 11 s, 3 h 05 min, 2 d 4 h."""
    if odd := _odd(seconds):
        return odd
    if seconds < 9.95:
        return f"{plain(round(seconds, 1))}{SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60:02d}{SPACE}s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}{SPACE}h {minutes % 60:02d}{SPACE}min"
    hours = round(seconds / 3600)
    return f"{hours // 24}{SPACE}d {hours % 24}{SPACE}h"


def date(text: str) -> str:
    """An ISO 8601 time as a date: 23 November 2026, 19:00 UTC. What is no such time comes back as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    day = f"{moment.day}{SPACE}{_MONTHS[moment.month - 1]} {moment.year}"
    if moment.tzinfo is None:
        return day
    utc = moment.astimezone(UTC)
    return f"{utc.day}{SPACE}{_MONTHS[utc.month - 1]} {utc.year}, {utc:%H:%M}{SPACE}UTC"
