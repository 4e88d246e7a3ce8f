"""The best and the worst completions of a run's first step and of its last ones, from ``samples.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ft_core.report.html import fold, text
from ft_core.report.numbers import DASH, count, plain
from ft_core.report.read import RunRecord, mapping, number

__all__ = ["completions"]

LAST = 3
"""Steps at the end of the run that are shown."""

RANKS = ("best", "worst")


def completions(record: RunRecord) -> str:
    """Two tables of completions that the model wrote while it was trained; empty where none are recorded."""
    steps = sorted(record.samples)
    if not steps:
        return ""
    first, last = steps[:1], steps[1:][-LAST:]
    out = [_table(f"The first that are recorded, of step {count(first[0])}", record, first)]
    if last:
        words = [count(step) for step in last]
        said = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
        out.append(_table(f"The last, of step{'s' if len(last) > 1 else ''} {said}", record, last))
    left = len(steps) - len(first) - len(last)
    if left:
        out.append(
            f'<p class="note">Those of {count(left)} further step{"s" if left > 1 else ""} are in samples.jsonl.</p>'
        )
    return "".join(out)


def _table(caption: str, record: RunRecord, steps: Sequence[float]) -> str:
    rows = [
        _row(record.samples[step][rank], rank, step) for step in steps for rank in RANKS if rank in record.samples[step]
    ]
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in ("Prompt", "Completion", "Reward"))
    return (  # the roles keep it a table for screen readers where a narrow page stacks its cells
        f'<table class="samples completions" role="table"><caption>{caption}</caption><thead role="rowgroup">'
        f'<tr role="row">{head}</tr></thead><tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def _row(sample: Mapping[str, Any], rank: str, step: float) -> str:
    mark = f'<span class="mark {"good" if rank == "best" else "bad"}">{rank} of step {count(step)}</span>'
    each = mapping(sample.get("rewards"))
    parts = "".join(f"<small>{text(name)} {_score(value)}</small>" for name, value in each.items())
    cells = (
        ("Prompt", _said(sample.get("prompt"))),
        ("Completion", _said(sample.get("completion")) + mark),
        ("Reward", f"<div><b>{_score(sample.get('reward'))}</b>{parts if len(each) > 1 else ''}</div>"),
    )
    return f'<tr role="row">{"".join(_cell(name, body) for name, body in cells)}</tr>'


def _cell(name: str, body: str) -> str:
    return f'<td role="cell"><span class="cell-name">{name}</span>{body}</td>'


def _said(value: Any) -> str:
    return fold(value) if isinstance(value, str) else f'<div class="said none">{DASH}</div>'


def _score(value: Any) -> str:
    score = number(value)
    return text(plain(score, 4)) if score is not None and math.isfinite(score) else DASH
