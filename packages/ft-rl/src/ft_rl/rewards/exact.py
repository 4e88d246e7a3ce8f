"""The reward ``exact-match``: whether the answer is one of those in the row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ft_rl.rewards.extraction import Part, PartName, extract
from ft_rl.rewards.samples import Text, column_of, score_each, text_of

__all__ = ["ExactMatchSettings", "Gold", "exact_match", "normalise"]


class Gold(Part):
    """Settings of a reward that compares an answer with the row's.

    Attributes:
        column: the data's column with the right answer, or a list of several; unset, ``answer`` or ``solution``.
        column_part: which part of the column's text is the answer, as ``part`` says of the completion's; GSM8K's
            needs ``marker``.
    """

    column: str | None = None
    column_part: PartName = "whole"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.column,) if self.column else ("answer", "solution")

    @property
    def needed(self) -> tuple[str, ...]:
        """For the attribute ``columns`` of a reward."""
        return ("|".join(self.names),)

    def accepted(self, value: Any) -> list[str]:
        """The right answers of a row, as text.

        Raises:
            ValueError: the row has none.
        """
        values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
        found = [extract(str(v), self, self.column_part) for v in values]
        answers = [text for text in found if text is not None]
        if not answers:
            raise ValueError(f"the row's {' or '.join(self.names)} {str(value)[:40]!r} holds no answer")
        return answers


class ExactMatchSettings(Gold):
    """Settings of ``exact-match``; those of :class:`Gold` and :class:`ft_rl.rewards.extraction.Part` too.

    Attributes:
        ignore_case: whether upper and lower case are the same.
        ignore_space: whether any white space is as good as one space.
        ignore_punctuation: whether to leave out all punctuation (Unicode's categories P).
    """

    ignore_case: bool = False
    ignore_space: bool = True
    ignore_punctuation: bool = False


def normalise(text: str, settings: ExactMatchSettings) -> str:
    """A text with the differences taken out that don't count; characters are composed (NFC) in any case."""
    text = unicodedata.normalize("NFC", text)
    if settings.ignore_case:
        text = text.casefold()
    if settings.ignore_punctuation:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return re.sub(r"\s+", " ", text).strip() if settings.ignore_space else text


def exact_match(settings: ExactMatchSettings) -> Any:
    """The reward function: 1.0 where the completion's answer equals one of the row's, 0.0 elsewhere."""

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        golds = column_of(columns, *settings.names)

        def score(i: int) -> float:
            accepted = {normalise(text, settings) for text in settings.accepted(golds[i])}
            answer = extract(text_of(completions[i]), settings)
            return float(answer is not None and normalise(answer, settings) in accepted)

        return score_each(len(completions), score)

    reward.columns = settings.needed  # type: ignore[attr-defined]
    return reward
