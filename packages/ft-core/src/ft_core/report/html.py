"""Pieces of HTML. Every text that comes from a model, a file or a person goes through :func:`text`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ["fold", "table", "text"]

LONGEST = 6000
"""Characters of one text that the page holds at most; it says how many it left out."""

FOLDED = 240
"""Characters above which a text is folded to its beginning."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def text(value: Any) -> str:
    """Any value as text that is safe in HTML, in quoted attributes too; control characters become visible."""
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def fold(value: str) -> str:
    """A text of a person or a model as a block that keeps its lines; a long one shows its beginning and opens."""
    value = value.strip("\n")
    if not value.strip():
        return '<div class="said none">(empty)</div>'
    left = len(value) - LONGEST
    if left > 0:
        value = value[:LONGEST]
    rest = f'<span class="none"> … {left:,} characters more</span>' if left > 0 else ""
    if len(value) <= FOLDED and value.count("\n") < 6:
        return f'<div class="said" dir="auto">{text(value)}{rest}</div>'
    start = "\n".join(value[:FOLDED].split("\n")[:5]).rstrip()
    return (
        f'<details class="said"><summary dir="auto"><span class="start">{text(start)} …</span></summary>'
        f'<div dir="auto">{text(value)}{rest}</div></details>'
    )


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table of cells that are HTML already; the first of a row is its heading. Empty without rows."""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    if not body:
        return ""
    top = f"<thead><tr>{''.join(f'<th scope=col>{text(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
    return f'<table class="{kind}"><caption>{text(caption)}</caption>{top}<tbody>{body}</tbody></table>'
