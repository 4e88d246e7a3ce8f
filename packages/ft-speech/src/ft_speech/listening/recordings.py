"""Recordings of rows looked at before training: how long they are, and which cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from ft_core.errors import DataError
from ft_speech.audio import SLACK, AudioError, audio_info
from ft_speech.references import audio_name, open_row, source_of

__all__ = ["SAID", "Look", "UnusableAudio", "looked_at", "shown"]

EXACT = ("wav", "flac", "ogg")
"""Formats whose header tells how long a file is; an mp3's may be an estimate."""
SAID = "held_out_rows_said"
"""The key of what a job keeps that says that the held-out rows which were left out have been named."""
BATCH = 64
THREADS = 8

Row = Mapping[str, Any]


class UnusableAudio(DataError):
    """A recording that turned out to be unusable when its batch was made. It stays one line on its way out of a worker,
    whose exceptions torch makes again with their whole traceback for a message."""

    def __init__(self, message: str) -> None:
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


class Look(NamedTuple):
    """What was seen of a row's recording: how long it is, in seconds, or what is wrong with it."""

    seconds: float
    fault: str | None


def looked_at(rows: Sequence[Row], *, whole: bool, most: float | None = None) -> Iterator[Look]:
    """What there is to know of each row's recording, in their order; files are read by several threads.

    Args:
        whole: decode each recording once, since what is damaged shows in the samples alone; else headers are read,
            save of an mp3, which is decoded.
        most: more seconds than the model hears. Of a recording that is longer no more are decoded, since hours of
            silence fit into a small file and not into memory; how long it is its header says. None: no bound.
    """
    left = iter(rows)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(left, BATCH)):
            yield from pool.map(lambda row: _look(row, whole, most), batch)


def _look(row: Row, whole: bool, most: float | None) -> Look:
    try:
        info = audio_info(source_of(row["audio"]))
        start, end = row.get("start") or 0.0, info.seconds if row.get("end") is None else row["end"]
        if not whole and info.format in EXACT and start < end <= info.seconds:  # else reading it says what is wrong
            return Look(end - start, None)
        if most is not None and end <= info.seconds + SLACK and (seconds := min(end, info.seconds) - start) > most:
            open_row({**row, "end": start + most})
            return Look(seconds, None)
        return Look(len(open_row(row)) / 16_000, None)
    except (AudioError, DataError) as error:
        return Look(0.0, str(error))


def shown(row: Mapping[str, Any]) -> str:
    """What to show a person of a row's recording: its name, and which stretch of it is meant."""
    name = audio_name(row["audio"]).replace("\\", "/").rpartition("/")[2]
    start, end = row.get("start"), row.get("end")
    if start is None and end is None:
        return f"[{name}]"
    return f"[{name}] from {start or 0:g} s" + ("" if end is None else f" to {end:g} s")
