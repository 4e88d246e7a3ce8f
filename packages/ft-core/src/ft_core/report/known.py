"""Plots of the numbers that methods of preference and of reinforcement record: a table of names, and how it is drawn.

The names are those under which TRL's trainers and ft's record them; whichever method records one gets its plot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ft_core.report.numbers import plain
from ft_core.report.plots import Series, Style, line_plot
from ft_core.report.read import RunRecord, number
from ft_core.report.series import smooth
from ft_core.report.verdict import smoothing_span

__all__ = ["Group", "column", "known_figures", "metric_plot"]

LONG = 24
"""Steps from which on a line is smoothed."""

STYLES: tuple[Style, ...] = ("line", "second", "third", "fourth", "fifth")
"""Of the lines of one plot, in their order; it holds no more."""


@dataclass(frozen=True)
class Group:
    """Metrics that one plot shows together.

    Attributes:
        name: an id. title, unit: the heading.
        members: names of metrics, each with its label. ``*`` in a name stands for any words, which are ``*`` in the
            label.
        unless: a metric; where this group has but one line, and that is the metric's, there is no second plot of it.
        held_out: whether the numbers mean anything of held-out rows, of which each prompt has one completion.
        wide: for the full width of the page.
    """

    name: str
    title: str
    unit: str
    members: tuple[tuple[str, str], ...]
    unless: str | None = None
    held_out: bool = True
    wide: bool = False


KNOWN = (
    Group(
        "reward",
        "Reward",
        "mean of a step's completions",
        (("reward", "total"), ("rewards/*/share", "*")),
        wide=True,
    ),
    Group("each-reward", "Each reward", "mean, before its weight", (("rewards/*/mean", "*"),), unless="reward"),
    Group(
        "reward-spread",
        "Spread of rewards",
        "standard deviation; each before its weight",
        (("reward_std", "total"), ("rewards/*/std", "*")),
        held_out=False,
    ),
    Group(
        "ties",
        "Prompts without a difference",
        "share whose completions all have one reward",
        (("frac_reward_zero_std", "prompts"),),
        held_out=False,
    ),
    Group("kl", "KL divergence", "from the reference", (("kl", "KL divergence"),)),
    Group(
        "policy-kl",
        "Change since the rollout",
        "KL divergence from the policy that wrote",
        (("approx_kl", "KL divergence"),),
        held_out=False,
    ),
    Group("entropy", "Entropy", "nats a token", (("entropy", "entropy"),)),
    Group(
        "clipped",
        "Clip fraction",
        "share that the loss clips",
        (
            ("clip_ratio/region_mean", "at either bound"),
            ("clip_ratio/low_mean", "at the lower bound"),
            ("clip_ratio/high_mean", "at the upper bound"),
            ("clip_fraction", "policy"),
            ("cispo_clip_ratio", "weights"),
            ("value/clip_fraction", "values"),
        ),
        held_out=False,
    ),
    Group(
        "length",
        "Response length",
        "tokens",
        (
            ("completions/mean_length", "mean"),
            ("completions/min_length", "shortest"),
            ("completions/max_length", "longest"),
        ),
    ),
    Group(
        "ended",
        "Length of those that ended",
        "tokens",
        (
            ("completions/mean_terminated_length", "mean"),
            ("completions/min_terminated_length", "shortest"),
            ("completions/max_terminated_length", "longest"),
        ),
    ),
    Group("cut", "Cut off", "share of completions that did not end", (("completions/clipped_ratio", "cut off"),)),
    Group(
        "gap",
        "Sampler gap",
        "nats a token, between sampler and trainer",
        (("sampling/gap", "mean"), ("sampling/sampling_logp_difference/mean", "TRL's mean")),
    ),
    Group("largest-gap", "Largest sampler gap", "nats, of a token", (("sampling/gap_max", "largest"),)),
    Group(
        "corrected",
        "Corrected for the gap",
        "share of micro-batches",
        (("sampling/corrected", "corrected"),),
        held_out=False,
    ),
    Group("written", "Completions", "a step", (("completions/count", "completions"),)),
    Group("rollouts", "Rollout rate", "completions per second", (("completions/per_second", "written"),)),
    Group(
        "step-time",
        "Time of a step",
        "seconds",
        (("step_time", "all of it"), ("completions/seconds", "writing completions")),
    ),
    Group("margin", "Margin", "chosen above rejected", (("rewards/margins", "reward"), ("margin", "score"))),
    Group("accuracy", "Accuracy", "share", (("rewards/accuracies", "pairs"), ("accuracy", "accuracy"))),
    Group("odds", "Log odds ratio", "chosen to rejected", (("log_odds_ratio", "log odds ratio"),)),
    Group("answers", "Rewards of answers", "", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    Group(
        "scores",
        "Scores",
        "of all answers",
        (("mean_reward", "mean"), ("min_reward", "lowest"), ("max_reward", "highest")),
    ),
    Group("logits", "Mean logits", "of answers", (("logits/chosen", "chosen"), ("logits/rejected", "rejected"))),
    Group("likelihood", "Log-likelihood", "of answers", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
)


def column(rows: Iterable[Mapping[str, Any]], key: str, scale: float = 1.0) -> tuple[list[float], list[float | None]]:
    """The steps that record ``key``, and its values there over ``scale``; None where there is no finite number."""
    steps: list[float] = []
    values: list[float | None] = []
    for row in rows:
        if key in row:
            value = number(row[key])
            steps.append(float(row["step"]))
            values.append(None if value is None or not math.isfinite(value) else value / scale)
    return steps, values


def metric_plot(
    record: RunRecord,
    name: str,
    title: str,
    keys: Sequence[tuple[str, str]],
    *,
    unit: str = "",
    zero: bool = True,
    held_out: bool = True,
    wide: bool = False,
) -> str:
    """A plot of one or several metrics: lines over the training's steps, points for held-out data.

    Args:
        name: an id, unique on the page. title, unit: the heading.
        keys: up to five metrics, each with its label. Of a long run the lines are smoothed, and the first one's steps
            shown too; the points are the first one's.
        zero: begin the axis at zero where no value is negative. held_out: show the points.
        wide: for the full width of the page.
    """
    several = len(keys) > 1
    behind: list[Series] = []
    lines: list[Series] = []
    points: list[Series] = []
    for (key, label), style in zip(keys, STYLES, strict=False):
        steps, values = column(record.train, key)
        said = f"{label}, " if several else ""
        if len(steps) >= LONG:
            span = smoothing_span(len(steps))
            if several and not lines:
                unit = f"{unit}, smoothed over {span} steps".removeprefix(", ")
            if not lines:
                behind.append(Series(f"{said}each step", steps, values, "faint"))
            words = label if several else f"smoothed over {span} steps"
            lines.append(Series(words, steps, smooth(values, span), style))
        else:
            lines.append(Series(label if several else "training", steps, values, style))
        if held_out and not points:
            at, measured = column(record.evals, key)
            points += [Series(f"{said}held-out data", at, measured, "points")] if at else []
    return line_plot(name, title, [*behind, *lines, *points], unit=unit, zero=zero, show=plain, wide=wide)


def known_figures(record: RunRecord, keys: Sequence[str]) -> tuple[list[str], set[str]]:
    """Plots of those of a run's metrics that the table knows, in its order, and which metrics they show."""
    plots: list[str] = []
    taken: set[str] = set()
    for group in KNOWN:
        found = [(key, label) for name, label in group.members for key, label in _matching(keys, name, label)]
        found = found[: len(STYLES)]
        taken.update(key for key, _ in found)
        if group.unless and len(found) == 1 and _same(record, found[0][0], group.unless):
            continue
        if found:
            name, held_out, wide = f"known-{group.name}", group.held_out, group.wide
            plots.append(metric_plot(record, name, group.title, found, unit=group.unit, held_out=held_out, wide=wide))
    return [plot for plot in plots if plot], taken


def _same(record: RunRecord, one: str, other: str) -> bool:
    """Whether two metrics were recorded at the same steps with values that float32 could not tell apart."""
    (steps, values), (at, others) = column(record.train, one), column(record.train, other)
    return steps == at and all(
        a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
        for a, b in zip(values, others, strict=True)
    )


def _matching(keys: Iterable[str], name: str, label: str) -> list[tuple[str, str]]:
    pattern = re.compile(re.escape(name).replace(r"\*", "(.+)"))
    return [
        (key, label.replace("*", match[1]) if match.groups() else label)
        for key in keys
        if (match := pattern.fullmatch(key))
    ]
