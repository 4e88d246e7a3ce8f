"""Which part of a completion is its answer."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Part", "PartName", "boxed", "extract", "in_tag"]

PartName = Literal["whole", "last-line", "boxed", "tag", "marker"]

BOXES = ("\\boxed{", "\\fbox{")

_MARKS = re.compile(r"\\.|[{}]", re.DOTALL)
"""Braces, and what a backslash makes another thing of: a brace that is shown, ``\\{``, groups nothing."""


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
    start = max(text.rfind(box) for box in BOXES)
    while start >= 0:
        begin = text.index("{", start) + 1
        depth = 1
        for mark in _MARKS.finditer(text, begin):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0:
                return text[begin : mark.start()]
        start = max(text.rfind(box, 0, start) for box in BOXES)
    return None


def in_tag(text: str, tag: str) -> str | None:
    """What the last closed ``<tag>…</tag>`` holds; None where there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if end >= 0 and start >= 0 else None
