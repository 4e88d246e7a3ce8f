"""Rows of recordings and what is said in them, in one normal form.

``{"audio": reference, "text": …}`` (:mod:`ft_speech.references`), and, where a row has them, ``language`` (its code),
``task`` (``transcribe`` or ``translate``), ``segments`` (``{"start", "end", "text"}``, in seconds from the beginning of
the row's stretch), and ``start`` and ``end``, the stretch of the recording that it is of, in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_core.data import Format
from ft_core.errors import DataError
from ft_speech.columns import TEXTS, audio_of, first, language_of, segments_of, stretch_of, text_of
from ft_speech.references import kind_of, reference_of

__all__ = ["TASKS", "as_transcription", "normalise"]

TASKS = ("transcribe", "translate")
"""What may be written down of a recording: what is said, or that in English."""

Row = Mapping[str, Any]


def as_transcription(row: Row) -> Row:
    """A row with a column ``text``, whatever its data set calls it (:data:`ft_speech.columns.TEXTS`); where there are
    ``segments`` alone, of their texts. See :attr:`ft_core.plugins.ModalitySpec.columns`.

    Columns by which a row could be taken for one of another format, such as ``prompt``, are left out of it.

    Raises:
        DataError: it has no recording or no text.
    """
    audio_of(row)
    if first(row, TEXTS) is None and row.get("segments"):
        pieces = (one["text"].strip() for one in segments_of(row, {}) or ())
        text = " ".join(piece for piece in pieces if piece)
    else:
        text = text_of(row)
    return {**{name: value for name, value in row.items() if name not in OTHERS}, "text": text}


OTHERS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction", "output", "label")
"""Columns of other formats."""


def normalise(row: Row, format: Format, folder: Path | None) -> dict[str, Any]:
    """A row in its normal form; see :attr:`ft_core.plugins.ModalitySpec.rows`.

    The text may be empty: nothing is said in the recording then.

    Args:
        row: with a column ``text``; its recording in one of :data:`ft_speech.columns.AUDIO`, as
            :func:`ft_speech.references.reference_of` takes it.
        folder: where relative paths are looked for.

    Raises:
        DataError: a column is missing or holds something else.
    """
    made: dict[str, Any] = {"audio": reference_of(audio_of(row), folder), **format.normalise(row)}
    language = language_of(row)
    if language is not None:
        made["language"] = language
    task = row.get("task")
    if task not in (None, ""):
        if task not in TASKS:
            shown = repr(task) if isinstance(task, str) else kind_of(task)
            raise DataError(f"task must be {' or '.join(TASKS)}, not {shown}")
        made["task"] = task
    stretch = stretch_of(row)
    segments = segments_of(row, stretch)
    if segments is not None:
        made["segments"] = segments
    return {**made, **stretch}
