"""Rows of texts and how they are spoken, in one normal form.

``{"text": …, "audio": reference}`` (:mod:`ft_speech.references`), and, where a row has them, ``voice`` (whose voice it
is) and ``style`` (how it is said), both text, and ``context``, such rows: the turns before, which a CSM hears.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_core.data import Format
from ft_core.errors import DataError
from ft_speech.columns import TEXTS, audio_of, first, text_of
from ft_speech.listening.rows import OTHERS
from ft_speech.references import kind_of, reference_of

__all__ = ["READ_OUT", "VOICES", "as_speech", "normalise"]

VOICES = ("voice", "speaker", "speaker_name", "speaker_id")
"""Where a row says whose voice it is: the first of these that it has."""
READ_OUT = ("normalized_text", *(name for name in TEXTS if name != "normalized_text"))
"""Where what is spoken is: the text as it is read out, where a row has that too."""
STRETCH = ("start", "end", "offset")

Row = Mapping[str, Any]


def as_speech(row: Row) -> Row:
    """A row with a column ``text``, whatever its data set calls it (:data:`READ_OUT`); see
    :attr:`ft_core.plugins.ModalitySpec.columns`.

    Raises:
        DataError: it has no recording or no text.
    """
    audio_of(row)
    return {**{name: value for name, value in row.items() if name not in OTHERS}, "text": text_of(row, READ_OUT)}


def normalise(row: Row, format: Format, folder: Path | None) -> dict[str, Any]:
    """A row in its normal form; see :attr:`ft_core.plugins.ModalitySpec.rows`.

    Args:
        row: with a column ``text``; its recording in one of :data:`ft_speech.columns.AUDIO`, as
            :func:`ft_speech.references.reference_of` takes it; its voice in one of :data:`VOICES`, text or a number.
        folder: where relative paths are looked for.

    Raises:
        DataError: a column is missing or holds something else, or there is nothing to be spoken.
    """
    made = {**format.normalise(row), "audio": reference_of(audio_of(row), folder)}
    if not made["text"].strip():
        raise DataError("text is empty, so there is nothing to be spoken")
    for name in STRETCH:
        if row.get(name) not in (None, ""):
            raise DataError(f"{name} says a stretch of a recording, which task: tts does not cut out: give it a file")
    if row.get("context"):
        made["context"] = _context(row["context"], format, folder)
    for key, names in (("voice", VOICES), ("style", ("style",))):
        column = first(row, names)
        if column is not None and (said := _label(row[column], column)):
            made[key] = said
    return made


def _context(turns: Any, format: Format, folder: Path | None) -> list[dict[str, Any]]:
    """What was said before: a list of rows, each with a text, a recording and perhaps a voice."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("context must be a list of turns, each an object with 'text', 'audio' and perhaps 'voice'")
    made = []
    for number, turn in enumerate(turns):
        try:
            # What is before a turn stands in the same list.
            made.append(normalise({k: v for k, v in as_speech(turn).items() if k != "context"}, format, folder))
        except DataError as error:
            raise DataError(f"context[{number}] {error}") from None
    return made


def _label(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{name} must be text or a whole number, not {kind_of(value)}")
    return str(value).strip()
