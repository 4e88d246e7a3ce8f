"""Columns of recordings and texts, as data sets call them, under one name each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ft_core.errors import DataError
from ft_speech.audio import SLACK
from ft_speech.references import kind_of

__all__ = ["AUDIO", "TEXTS", "audio_of", "first", "language_of", "seconds", "segments_of", "stretch_of", "text_of"]

AUDIO = ("audio", "file_name", "audio_filepath", "audio_path", "file", "path")
"""Where recordings are: the first of these that a row has. ``file_name`` is that of Hugging Face's audiofolder,
``audio_filepath`` of NeMo's manifests."""
TEXTS = ("text", "sentence", "transcription", "transcript", "transcript_text", "normalized_text")
"""Where what is said is: the first of these that a row has."""
LANGUAGES = ("language", "lang", "locale")

Row = Mapping[str, Any]


def first(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that a row has and that is not null."""
    return next((name for name in names if row.get(name) is not None), None)


def audio_of(row: Row) -> Any:
    """What a row gives of its recording.

    Raises:
        DataError: no column of :data:`AUDIO` is there.
    """
    name = first(row, AUDIO)
    if name is None:
        raise DataError(f"has no recording: it needs one of the columns {', '.join(AUDIO)} (found {_found(row)})")
    return row[name]


def text_of(row: Row, names: Sequence[str] = TEXTS) -> str:
    """What is said in a row's recording: the first of these columns.

    Raises:
        DataError: no column of :data:`TEXTS` is there, or it is no text.
    """
    name = first(row, names)
    if name is None:
        raise DataError(f"has no text: it needs one of the columns {', '.join(names)} (found {_found(row)})")
    if not isinstance(row[name], str):
        raise DataError(f"{name} must be text, not {kind_of(row[name])}")
    return str(row[name])


def language_of(row: Row) -> str | None:
    """The code of a row's language, such as ``en`` or ``yue``, where it has one: of a code with a region (``en-US``) or
    script its first part, of a language's English name the code that Whisper has for it.

    Raises:
        DataError: it is neither.
    """
    name = first(row, LANGUAGES)
    if name is None:
        return None
    given = row[name]
    if not isinstance(given, str):
        raise DataError(f"{name} must be a language's code, such as en, not {kind_of(given)}")
    said = given.strip().lower()
    if not said:
        return None
    code = said.replace("_", "-").partition("-")[0]
    if code.isascii() and code.isalpha() and len(code) in (2, 3):
        return code
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if said not in TO_LANGUAGE_CODE:
        raise DataError(f"{name} is {given!r}, neither a code, such as en, nor the English name of a language")
    return str(TO_LANGUAGE_CODE[said])


def seconds(value: Any, name: str) -> float:
    """A time in seconds; from csv files it is text.

    Raises:
        DataError: it is no number of at least 0.
    """
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        shown = repr(value) if isinstance(value, int | float | str) else kind_of(value)
        raise DataError(f"{name} must be a number of seconds of at least 0, not {shown}")
    return number


def stretch_of(row: Row) -> dict[str, float]:
    """``start`` and ``end`` of the stretch of the recording that a row is of, where it says so: these columns, or
    ``offset`` and ``duration``, as NeMo's manifests have them.

    Raises:
        DataError: one is no number of seconds, or the end is not after the start.
    """
    names = [name for name in ("start", "end", "offset", "duration") if row.get(name) not in (None, "")]
    if "offset" in names and {"start", "end"} & set(names):
        raise DataError("has an offset and a start or end: one of the two ways says the stretch")
    if "offset" in names:
        start = seconds(row["offset"], "offset")
        found = {"start": start}
        if "duration" in names:
            found["end"] = start + seconds(row["duration"], "duration")
    else:
        found = {name: seconds(row[name], name) for name in ("start", "end") if name in names}
    if found.get("end", math.inf) <= found.get("start", 0.0):
        what = "duration is 0" if "offset" in names else f"end is {found['end']:g} s"
        raise DataError(f"{what}: a stretch ends after its start, {found.get('start', 0.0):g} s")
    return found


def segments_of(row: Row, stretch: Mapping[str, float]) -> list[dict[str, Any]] | None:
    """What is said when, where a row says it: ``segments``, a list (or its JSON, in csv files) of objects with
    ``start``, ``end`` and ``text``, in seconds from the beginning of the row's stretch.

    Raises:
        DataError: something else is there, a segment ends before it starts, begins before the last one's beginning, or
            reaches beyond the stretch.
    """
    given = row.get("segments")
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except ValueError as error:
            raise DataError(f"segments is not valid JSON: {error}") from None
    if given is None or given == "":
        return None
    if not isinstance(given, list):
        raise DataError(f"segments must be a list of objects with 'start', 'end' and 'text', not {kind_of(given)}")
    found: list[dict[str, Any]] = []
    longest = stretch.get("end", math.inf) - stretch.get("start", 0.0)
    for number, one in enumerate(given):
        name = f"segments[{number}]"
        if not isinstance(one, Mapping):
            raise DataError(f"{name} must be an object with 'start', 'end' and 'text', not {kind_of(one)}")
        if not isinstance(one.get("text"), str):
            raise DataError(f"{name}'s text must be text, not {kind_of(one.get('text'))}")
        start, end = (seconds(one.get(key), f"{name}'s {key}") for key in ("start", "end"))
        before = found[-1]["start"] if found else 0.0
        if end < start or start < before:
            what = f"ends at {end:g} s" if end < start else f"starts at {start:g} s"
            than = f"starts at {start:g} s" if end < start else f"the one before it starts at {before:g} s"
            raise DataError(f"{name} {what}, but {than}: segments are in the order of time")
        if end > longest + SLACK:
            raise DataError(f"{name} ends at {end:g} s of a stretch of {longest:g} s")
        found.append({"start": start, "end": end, "text": one["text"]})
    return found


def _found(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"
