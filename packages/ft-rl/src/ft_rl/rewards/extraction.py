"""Which part of a completion is its answer."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Part", "PartName", "boxed", "extract", "in_tag"]

PartName = Literal["whole", "last-line", "boxed", "tag", "marker"]

_MARKS = re.compile(r"\\(?:boxed|fbox)\{|\\.|[{}]", re.DOTALL)
"""Where a box begins, braces, and what a backslash makes another thing of: ``\\{`` is shown and groups nothing."""


class Part(BaseModel):
    """Settings of a reward that judges a part of a completion.

    Attributes:
        part: ``whole``; ``last-line`` (the last that isn't empty); ``boxed`` (what the last ``\\boxed{…}`` holds);
            ``tag`` (what the last ``<answer>…</answer>`` holds); or ``marker`` (the first line with something on it
            after the last marker). A completion without it has no answer.
        tag: the tag's name.
        marker: the marker.
    """

    model_config = ConfigDict(extra="forbid")

    part: PartName = "whole"
    tag: str = Field(default="answer", min_length=1)
    marker: str = Field(default="####", min_length=1)


def extract(text: str, settings: Part, part: PartName | None = None) -> str | None:
    """The part of a text that is its answer, without white space around it; None where there is none.

    Args:
        part: instead of the one in ``settings``.
    """
    found: str | None
    match part or settings.part:
        case "whole":
            found = text
        case "last-line":
            found = next((line for line in reversed(text.splitlines()) if line.strip()), None)
        case "boxed":
            found = boxed(text)
        case "tag":
            found = in_tag(text, settings.tag)
        case "marker":
            _, marker, rest = text.rpartition(settings.marker)
            found = next((line for line in rest.splitlines() if line.strip()), None) if marker else None
    return found.strip() if found is not None else None


def boxed(text: str) -> str | None:
    """What the last closed ``\\boxed{…}`` holds, braces inside it matched; None where there is none."""
    opened: list[tuple[bool, int]] = []  # whether it is a box, and where what it holds begins
    last: tuple[int, int] | None = None
    for mark in _MARKS.finditer(text):
        if mark[0] == "}":
            is_box, begin = opened.pop() if opened else (False, 0)
            if is_box and (last is None or begin > last[0]):
                last = begin, mark.start()
        elif mark[0].endswith("{") and mark[0] != "\\{":
            opened.append((mark[0] != "{", mark.end()))
    return text[last[0] : last[1]] if last else None


def in_tag(text: str, tag: str) -> str | None:
    """What the last closed ``<tag>…</tag>`` holds; None where there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if end >= 0 and start >= 0 else None
