"""The reward ``numeric``: whether the answer's number is the row's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from ft_rl.rewards.exact import Gold
from ft_rl.rewards.extraction import extract
from ft_rl.rewards.samples import Text, column_of, score_each, text_of

__all__ = ["NumericSettings", "last_number", "numeric"]

DIGITS = 400
"""More digits, or a higher power of ten, than this is no answer: a number must not take hours to expand."""

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""(?<![\w.])(?P<sign>[-+]?)(?:[$€£]\s?)?
    (?:(?P<whole>\d+)\s+(?P<above>\d+)/(?P<below>\d+)      # 2 1/2
     |(?P<top>{_UNSIGNED})\s?/\s?(?P<bottom>{_UNSIGNED})   # 1/2
     |(?P<plain>{_UNSIGNED})(?:[eE](?P<power>[-+]?\d+))?   # 1,234.5, 1e-3
    )\s?(?P<percent>%|\\%)?""",
    re.VERBOSE,
)


class NumericSettings(Gold):
    """Settings of ``numeric``; those of :class:`ft_rl.rewards.exact.Gold` too.

    Attributes:
        tolerance: how far the numbers may be apart.
        relative: or how far as a share of the row's number. Both 0: they are equal, exactly (0.5 is 1/2).
        percent: what ``50%`` is: 50 (``ignore``) or 0.5 (``divide``).
    """

    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    percent: Literal["ignore", "divide"] = "ignore"


def last_number(text: str, *, divide_percent: bool = False) -> Fraction | None:
    """The last number in a text, exactly; None where there is none.

    Understood are signs (the minus sign too), thousands in groups, decimals, powers of ten, fractions and mixed
    numbers, with a currency's sign before and a per cent sign behind. A digit that is part of a word is no number.
    """
    found = list(_NUMBER.finditer(text.replace("\u2212", "-")))
    return _value(found[-1], divide_percent) if found else None


def _value(match: re.Match[str], divide_percent: bool) -> Fraction | None:
    if len(match[0]) > DIGITS or abs(int(match["power"] or 0)) > DIGITS:
        return None
    if match["whole"]:
        if int(match["below"]) == 0:
            return None
        value = int(match["whole"]) + Fraction(int(match["above"]), int(match["below"]))
    elif match["top"]:
        bottom = _decimal(match["bottom"])
        if bottom == 0:
            return None
        value = _decimal(match["top"]) / bottom
    else:
        value = _decimal(match["plain"]) * Fraction(10) ** int(match["power"] or 0)
    if match["percent"] and divide_percent:
        value /= 100
    return -value if match["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def numeric(settings: NumericSettings) -> Any:
    """The reward function: 1.0 where the last number of the completion's answer is the row's, 0.0 elsewhere."""
    divide = settings.percent == "divide"

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        golds = column_of(columns, *settings.names)

        def score(i: int) -> float:
            accepted = [last_number(text, divide_percent=divide) for text in settings.accepted(golds[i])]
            numbers = [number for number in accepted if number is not None]
            if not numbers:
                raise ValueError(f"the row's {' or '.join(settings.names)} {str(golds[i])[:40]!r} holds no number")
            text = extract(text_of(completions[i]), settings)
            answer = last_number(text, divide_percent=divide) if text is not None else None
            if answer is None:
                return 0.0
            return float(any(_near(answer, number, settings) for number in numbers))

        return score_each(len(completions), score)

    reward.columns = settings.needed  # type: ignore[attr-defined]
    return reward


def _near(answer: Fraction, gold: Fraction, settings: NumericSettings) -> bool:
    allowed = max(Fraction(settings.tolerance), Fraction(settings.relative) * abs(gold))
    return abs(answer - gold) <= allowed
