"""The rewards ``regex`` and ``format``: whether a completion has a form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ft_rl.rewards.samples import Text, score_each, text_of

__all__ = ["FormatSettings", "RegexSettings", "format_reward", "regex", "tags_kept"]


class RegexSettings(BaseModel):
    """Settings of ``regex``.

    Attributes:
        pattern: a regular expression of Python's; the dot matches line ends too. One that can match the same text in
            many ways may take very long on a completion, and nothing stops it.
        match: where it must match: anywhere (``search``) or the whole completion (``full``), white space around it
            apart.
        ignore_case: whether upper and lower case are the same.
    """

    model_config = ConfigDict(extra="forbid")

    pattern: str = Field(min_length=1)
    match: Literal["search", "full"] = "search"
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"a regular expression of Python's: {error}") from None
        return pattern


def regex(settings: RegexSettings) -> Any:
    """The reward function: 1.0 where the pattern matches, 0.0 elsewhere."""
    compiled = re.compile(settings.pattern, re.DOTALL | (re.IGNORECASE if settings.ignore_case else 0))
    matches = compiled.fullmatch if settings.match == "full" else compiled.search

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        return score_each(len(completions), lambda i: float(matches(text_of(completions[i]).strip()) is not None))

    return reward


class FormatSettings(BaseModel):
    """Settings of ``format``.

    Attributes:
        tags: the tags that the completion is made of, in this order, each opened and closed once.
        opened: whether the prompt's end has opened the first tag already, as some chat templates do.
        outside: whether text may stand before, between and after them.
        partial: whether a completion that lacks some gets the share of the opening and closing tags that are there
            once (:func:`tags_kept`), instead of 0.
    """

    model_config = ConfigDict(extra="forbid")

    tags: list[str] = Field(default=["think", "answer"], min_length=1)
    opened: bool = False
    outside: bool = False
    partial: bool = False

    @field_validator("tags")
    @classmethod
    def _names(cls, tags: list[str]) -> list[str]:
        if any(not tag.strip("</> \n") == tag or not tag for tag in tags) or len(set(tags)) < len(tags):
            raise ValueError("different names, without < and >")
        return tags


def format_reward(settings: FormatSettings) -> Any:
    """The reward function: 1.0 where the completion has the form, 0.0 (or its share) elsewhere."""
    between = ".*?" if settings.outside else r"\s*"
    inside = [f"<{re.escape(tag)}>(?:(?!</?(?:{_any(settings.tags)})>).)*</{re.escape(tag)}>" for tag in settings.tags]
    form = re.compile(rf"{between}{between.join(inside)}{between}", re.DOTALL)

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        def score(i: int) -> float:
            text = text_of(completions[i])
            if settings.opened:
                text = f"<{settings.tags[0]}>{text}"
            kept = tags_kept(text, settings.tags)
            if kept == 1 and form.fullmatch(text):
                return 1.0
            # All tags in another order, or text where none may be, is no whole form either.
            return min(kept, 1 - 1 / (2 * len(settings.tags))) if settings.partial else 0.0

        return score_each(len(completions), score)

    return reward


def tags_kept(text: str, tags: Sequence[str]) -> float:
    """The share of the opening and closing tags that are in a text exactly once."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)


def _any(tags: Sequence[str]) -> str:
    return "|".join(map(re.escape, tags))
