"""What an evaluation's numbers mean: their names, how to print them, and which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ft_core.report.numbers import DASH, MINUS, SPACE, percent, plain
from ft_core.report.read import RunRecord, mapping, number

__all__ = ["Metric", "label", "metrics_of"]

_NAMES = {"wer": "Word error rate", "cer": "Character error rate", "anls": "ANLS", "grad_norm": "Gradient norm"}
_SHARES = ("exact_match", "accuracy", "win_rate", "wer", "cer")
_LOWER = ("loss", "perplexity", "wer", "cer", "error_rate")
_HIGHER = (
    *("exact_match", "accuracy", "accuracies", "win_rate", "anls", "f1", "bleu"),
    *("reward", "rewards", "margin", "margins"),
)


def label(key: str) -> str:
    """A metric's key as a heading: ``exact_match`` is Exact match."""
    return _NAMES.get(key) or key.replace("_", " ").replace("/", " ").strip().capitalize() or key


def _ends(key: str, words: tuple[str, ...]) -> bool:
    return any(key == word or key.endswith(("_" + word, "/" + word)) for word in words)


@dataclass(frozen=True)
class Metric:
    """One measured number before and after training; either may be missing."""

    key: str
    before: float | None
    after: float | None

    @property
    def name(self) -> str:
        return label(self.key)

    @property
    def share(self) -> bool:
        """Whether it is a share from 0 to 1, printed in percent."""
        return _ends(self.key, _SHARES)

    def show(self, value: float | None, digits: int = 4) -> str:
        if value is None:
            return DASH
        return percent(value) if self.share else plain(value, digits)

    @property
    def verb(self) -> str:
        """How it went: rose, fell, stayed, or empty where a side is missing or no number."""
        if self.before is None or self.after is None or math.isnan(self.before) or math.isnan(self.after):
            return ""
        if self.after == self.before:
            return "stayed"
        return "rose" if self.after > self.before else "fell"

    @property
    def better(self) -> bool | None:
        """Whether the change is for the better; None where there is none or the direction has no known meaning."""
        if self.verb not in ("rose", "fell"):
            return None
        if _ends(self.key, _LOWER):
            return self.verb == "fell"
        return self.verb == "rose" if _ends(self.key, _HIGHER) else None

    @property
    def change(self) -> str:
        """The difference: in points for a share, in percent of the old value for another number."""
        if not self.verb or self.before is None or self.after is None:
            return DASH
        if self.verb == "stayed":
            return "none"
        sign = "+" if self.verb == "rose" else MINUS
        difference = abs(self.after - self.before)
        if not math.isfinite(difference):
            return DASH
        if self.share:
            return f"{sign}{plain(round(difference * 100, 1))}{SPACE}points"
        if self.before == 0:
            return f"{sign}{plain(difference, 3)}"
        relative = difference / abs(self.before) * 100
        if relative >= 1000:
            return f"\N{MULTIPLICATION SIGN} {plain(abs(self.after / self.before), 3)}"
        if 99.95 <= relative < 100 and self.after:
            return f"\N{DIVISION SIGN} {plain(abs(self.before / self.after), 3)}"
        return f"{sign}{plain(round(relative, 1), 3)}{SPACE}%"


def metrics_of(record: RunRecord) -> list[Metric]:
    """The metrics of a run's evaluation, those in percent first, since they say most."""
    found = []
    for key, value in mapping(mapping(record.evaluation).get("metrics")).items():
        sides = mapping(value)
        metric = Metric(str(key), number(sides.get("before")), number(sides.get("after")))
        if metric.before is not None or metric.after is not None:
            found.append(metric)
    return sorted(found, key=lambda metric: not metric.share)
