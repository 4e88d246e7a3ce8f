"""Columns in which data sets of questions about images, captions and transcripts come, as conversations.

Only rows that hold something to see, and no conversation of their own, are touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ft_core.errors import DataError
from ft_vision.rows import ANSWERS
from ft_vision.seen import SEEN

__all__ = ["as_messages"]

CONVERSATIONS = ("messages", "conversations", "chosen", "instruction")
QUESTIONS = ("question", "query")
ANSWER = ("answer", ANSWERS, "label", "multiple_choice_answer")
CAPTIONS = ("text", "caption", "captions")
TURNS = "texts"


def as_messages(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with ``messages`` beside its columns, where these are one of:

    * ``question`` (or ``query``) and ``answer``, ``answers``, ``label`` or ``multiple_choice_answer``: text, a number,
      or a list of these, or of objects with an ``answer`` as VQA has them, of which the most frequent is learnt, the
      first of several; all stay in ``answers``, with those that the row has there beside ``answer``;
    * ``text``, ``caption`` or ``captions``: what is learnt to be said of the image alone, without a question;
    * ``texts``: a list of ``{"user", "assistant"}``, turn by turn, as in The Cauldron;
    * ``prompt`` and ``completion`` as strings.

    Raises:
        DataError: there is a question without an answer, or one of them is no text.
    """
    if all(row.get(name) is None for name in SEEN) or any(row.get(name) is not None for name in CONVERSATIONS):
        return row
    if isinstance(row.get(TURNS), list):
        return {**row, "messages": [message for n, turn in enumerate(row[TURNS]) for message in _turn(turn, n)]}
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and "label" not in row:
        return {**row, "messages": _asked(row["prompt"], row["completion"])}
    if row.get("prompt") is not None:
        return row
    question = _first(row, QUESTIONS)
    if question is not None:
        answer = _first(row, ANSWER)
        if answer is None:
            return row
        if not isinstance(row[question], str):
            raise DataError(f"{question} must be text, not a {type(row[question]).__name__}")
        return _answered(row, row[question], answer)
    caption = _first(row, CAPTIONS)
    return row if caption is None else _answered(row, "", caption)


def _answered(row: Mapping[str, Any], question: str, column: str) -> dict[str, Any]:
    answers = _texts(row[column], column)
    if not answers:
        raise DataError(f"{column} is empty, so there is nothing to learn")
    made = {**row, "messages": _asked(question, Counter(answers).most_common(1)[0][0])}
    accepted = made.pop(ANSWERS, None)
    if column != ANSWERS and accepted is not None:
        answers += _texts(accepted, ANSWERS)
    different = list(dict.fromkeys(answers))
    return made | ({ANSWERS: different} if len(different) > 1 else {})


def _texts(given: Any, column: str) -> list[str]:
    each = given if isinstance(given, list) else [given]
    return [_text(one.get("answer") if isinstance(one, Mapping) else one, column) for one in each]


def _asked(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _turn(turn: Any, number: int) -> list[dict[str, str]]:
    user, assistant = (turn.get(key) if isinstance(turn, Mapping) else None for key in ("user", "assistant"))
    if not (isinstance(user, str) and isinstance(assistant, str)):
        raise DataError(f"{TURNS}[{number}] must be an object with 'user' and 'assistant', both text")
    return _asked(user, assistant)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _text(value: Any, column: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    shown = "empty" if isinstance(value, str) else f"a {type(value).__name__}"
    raise DataError(f"{column} must be text, a number or a list of them, not {shown}")
