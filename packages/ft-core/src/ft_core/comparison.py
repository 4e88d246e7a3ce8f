"""Two measurements beside each other, before and after: the content of ``evaluation.json``, and its table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ft_core.console import counted

if TYPE_CHECKING:
    from ft_core.evaluation import Evaluation

__all__ = ["EXACT", "OF_ANSWERS", "compare", "table"]

EXACT = "exact_match"

OF_ANSWERS = {EXACT: "exact match", "cer": "CER", "wer": "WER", "anls": "ANLS"}
"""What is measured on answers, and not on all rows, by the names that people know it by."""


def compare(before: Evaluation | dict[str, Any] | None, after: Evaluation | None, data: str) -> dict[str, Any]:
    """The content of ``evaluation.json`` (see the page on run folders); ``before`` may be an earlier such content."""
    if isinstance(before, dict):
        old_metrics = {name: value.get("before") for name, value in before.get("metrics", {}).items()}
        old_answers = [(s["prompt"], (s.get("before"), _side(s, "before"))) for s in before.get("samples", [])]
        rows = before.get("rows", 0)
    elif before is not None:
        old_metrics, rows = dict(before.metrics), before.rows
        old_answers = [(s.prompt, (s.answer, s.right)) for s in before.samples]
    else:
        old_metrics, old_answers, rows = {}, [], 0
    new_metrics = dict(after.metrics) if after else {}
    measured = after if after or isinstance(before, dict) else before
    shown = measured.samples if measured else []
    samples = []
    for number, s in enumerate(shown):
        # By place, since two rows may end with the same question; a look at the prompt for files of another order.
        asked, old = old_answers[number] if number < len(old_answers) else (None, (None, None))
        said, was_right = old if asked == s.prompt else dict(old_answers).get(s.prompt, (None, None))
        sample: dict[str, Any] = {
            "prompt": s.prompt,
            "expected": s.expected,
            "before": said,
            "after": s.answer if after else None,
        }
        if s.right is not None:
            sample["right"] = {"before": was_right, "after": s.right if after else None}
        samples.append(sample)
    names = list(dict.fromkeys([*new_metrics, *old_metrics]))
    metrics = {n: {"before": _finite(old_metrics.get(n)), "after": _finite(new_metrics.get(n))} for n in names}
    found = {"data": data, "rows": after.rows if after else rows, "metrics": metrics, "samples": samples}
    if not metrics.keys().isdisjoint(OF_ANSWERS):
        found["answers"] = len(samples) if not measured or measured.answers is None else measured.answers
    if measured and measured.compared is not None:
        found["compared"] = measured.compared
    return found


def _side(sample: dict[str, Any], side: str) -> bool | None:
    """Whether a sample of ``evaluation.json`` was right, where it says so."""
    right = sample.get("right")
    return right.get(side) if isinstance(right, dict) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def table(comparison: dict[str, Any]) -> str:
    """The before/after table as plain text."""
    lines = [f"{'':<16}{'before':>12}{'after':>12}"]
    for name, values in comparison["metrics"].items():
        cells = "".join(f"{_cell(name, values.get(side)):>12}" for side in ("before", "after"))
        lines.append(f"{OF_ANSWERS.get(name, name.replace('_', ' ')):<16}{cells}")
    over = f"over {counted(comparison['rows'], 'row')} of {comparison['data']}"
    answers = comparison.get("answers", comparison["rows"])
    if answers != comparison["rows"]:
        names = [known for name, known in OF_ANSWERS.items() if name in comparison["metrics"]]
        over = f"{over}, {', '.join(names)} over {counted(answers, 'answer')}"
    lines.append(over)
    if comparison.get("compared"):
        ways = ", ".join(f"{key}: {str(value).lower()}" for key, value in comparison["compared"].items())
        lines.append(f"answers compared with {ways}")
    return "\n".join(lines)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "—"
    if name in (EXACT, "cer", "wer", "accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if value < 1e5 else f"{value:.3e}"
