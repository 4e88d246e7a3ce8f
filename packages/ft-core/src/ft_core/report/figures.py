"""Which plots a run gets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ft_core.report.metrics import label
from ft_core.report.numbers import memory, plain
from ft_core.report.plots import Bar, Series, bar_plot, line_plot
from ft_core.report.read import RunRecord, mapping, number
from ft_core.report.series import smooth
from ft_core.report.verdict import losses, smoothing_span

__all__ = ["figures"]

GIB = 2.0**30
MOST = 24
"""Plots of a method's own metrics at most; the page says how many more there are."""

_KNOWN = {"kind", "step", "epoch", "loss", "learning_rate", "tokens", "tokens_per_second", "memory", "seconds"}
_PHASES = {"load": "Load", "train": "Train", "evaluate": "Evaluate", "save": "Save"}


def figures(record: RunRecord) -> str:
    """All figures of a run, empty where nothing was recorded."""
    own, left_out = _others(record)
    plots = [_loss(record), _rate(record), _throughput(record), _memory(record), _phases(record), *own]
    plots = [plot for plot in plots if plot]
    note = f'<p class="note">{left_out} more metrics are in metrics.jsonl.</p>' if left_out else ""
    return f'<div class="figures">{"".join(plots)}</div>{note}' if plots else ""


def _column(rows: Iterable[Mapping[str, Any]], key: str, scale: float = 1.0) -> tuple[list[float], list[float | None]]:
    steps: list[float] = []
    values: list[float | None] = []
    for row in rows:
        if key in row:
            value = number(row[key])
            steps.append(float(row["step"]))
            values.append(None if value is None or not math.isfinite(value) else value / scale)
    return steps, values


def _loss(record: RunRecord) -> str:
    steps, values, odd = losses(record)
    span = smoothing_span(len(steps))
    series = []
    if len(steps) >= 3 * 8:
        series.append(Series("each step", steps, values, "faint"))
        series.append(Series(f"smoothed over {span} steps", steps, smooth(values, span)))
    else:
        series.append(Series("training", steps, values))
    at, held_out = _column(record.evals, "loss")
    series.append(Series("held-out data", at, held_out, "points"))
    return line_plot("loss", "Loss", series, marks=odd, marks_label="no finite loss", wide=True)


def _rate(record: RunRecord) -> str:
    return line_plot(
        "learning-rate", "Learning rate", [Series("learning rate", *_column(record.train, "learning_rate"))]
    )


def _throughput(record: RunRecord) -> str:
    steps, values = _column(record.train, "tokens_per_second")
    series = [Series("each step", steps, values, "faint")]
    if len(steps) >= 24:
        span = smoothing_span(len(steps))
        series.append(Series(f"smoothed over {span} steps", steps, smooth(values, span)))
    else:
        series = [Series("tokens per second", steps, values)]
    return line_plot("throughput", "Throughput", series, unit="tokens per second")


def _memory(record: RunRecord) -> str:
    return line_plot(
        "memory", "Memory", [Series("peak so far", *_column(record.train, "memory", GIB))], unit="GiB, peak"
    )


def _phases(record: RunRecord) -> str:
    bars = []
    for phase, value in mapping(mapping(record.summary).get("memory")).items():
        size = number(value)
        if size is not None:
            bars.append(Bar(_PHASES.get(str(phase), label(str(phase))), size, memory(size)))
    return bar_plot("phases", "Peak memory", bars, unit="by the end of each phase")


def _others(record: RunRecord) -> tuple[list[str], int]:
    """A plot of every other number, the method's own first (training and held-out in one), and how many have none."""
    keys: dict[str, None] = {}
    for row in (*record.train, *record.evals):
        keys.update((key, None) for key, value in row.items() if key not in _KNOWN and number(value) is not None)
    order = sorted(keys, key=lambda key: key == "grad_norm")
    plots = []
    for i, key in enumerate(order[:MOST]):
        steps, values = _column(record.train, key)
        at, held_out = _column(record.evals, key)
        long = len(steps) >= 24
        series = [Series("each step" if long else "training", steps, values, "faint" if long else "line")]
        if long:
            span = smoothing_span(len(steps))
            series.append(Series(f"smoothed over {span} steps", steps, smooth(values, span)))
        series.append(Series("held-out data", at, held_out, "points"))
        plots.append(line_plot(f"metric-{i}", label(key), series, zero=key == "grad_norm", show=plain))
    return plots, max(0, len(order) - MOST)
