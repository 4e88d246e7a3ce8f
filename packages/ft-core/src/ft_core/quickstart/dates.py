"""The quickstart's task: dates as people write them in eight languages, to be written as ISO 8601.

The dates are written by Babel from the Unicode CLDR's patterns and names, so the data is generated from that source at
will, and a held-out date is one that no training row has: the sets are split by the day itself, not by its spelling.
"""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

from ft_core.errors import DataError

__all__ = ["LOCALES", "SYSTEM", "make"]

LOCALES = ("en_US", "en_GB", "de", "fr", "es", "it", "pt", "nl")
STYLES = ("long", "full", "medium")
SYSTEM = "Write the date in ISO 8601 form."
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)


def make(folder: Path, *, train: int = 2400, held_out: int = 100, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``held_out.jsonl`` (chat rows) into ``folder`` and return their paths.

    Args:
        folder: made if need be.
        train: how many training rows.
        held_out: how many held-out rows, each of a day that no training row is of.
        seed: of the draw.

    Raises:
        DataError: Babel is not installed.
    """
    try:
        from babel.dates import format_date
    except ImportError:
        raise DataError("the quickstart needs Babel for the names of months and days: pip install Babel") from None
    draw = random.Random(seed)
    days = draw.sample(range((LAST - FIRST).days + 1), train + held_out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, part in (("held_out", days[:held_out]), ("train", days[held_out:])):
        path = folder / f"{name}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for day in part:
                date = FIRST + datetime.timedelta(days=day)
                text = format_date(date, draw.choice(STYLES), locale=draw.choice(LOCALES))
                file.write(json.dumps(_row(text, date), ensure_ascii=False) + "\n")
        paths.append(path)
    return paths[1], paths[0]


def _row(text: str, date: datetime.date) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": date.isoformat()},
        ]
    }
