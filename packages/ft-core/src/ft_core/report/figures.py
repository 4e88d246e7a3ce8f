"""Which plots a run gets."""

from __future__ import annotations

from ft_core.report.known import column, known_figures, metric_plot
from ft_core.report.metrics import label
from ft_core.report.numbers import memory
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
    known, own, left_out = _others(record)
    plots = [_loss(record), *known, _rate(record), _throughput(record), _memory(record), _phases(record), *own]
    plots = [plot for plot in plots if plot]
    note = f'<p class="note">{left_out} more metrics are in metrics.jsonl.</p>' if left_out else ""
    return f'<div class="figures">{"".join(plots)}</div>{note}' if plots else ""


def _loss(record: RunRecord) -> str:
    steps, values, odd = losses(record)
    span = smoothing_span(len(steps))
    series = []
    if len(steps) >= 3 * 8:
        series.append(Series("each step", steps, values, "faint"))
        series.append(Series(f"smoothed over {span} steps", steps, smooth(values, span)))
    else:
        series.append(Series("training", steps, values))
    at, held_out = column(record.evals, "loss")
    series.append(Series("held-out data", at, held_out, "points"))
    return line_plot("loss", "Loss", series, marks=odd, marks_label="no finite loss", wide=True)


def _rate(record: RunRecord) -> str:
    return line_plot(
        "learning-rate", "Learning rate", [Series("learning rate", *column(record.train, "learning_rate"))]
    )


def _throughput(record: RunRecord) -> str:
    steps, values = column(record.train, "tokens_per_second")
    series = [Series("each step", steps, values, "faint")]
    if len(steps) >= 24:
        span = smoothing_span(len(steps))
        series.append(Series(f"smoothed over {span} steps", steps, smooth(values, span)))
    else:
        series = [Series("tokens per second", steps, values)]
    return line_plot("throughput", "Throughput", series, unit="tokens per second")


def _memory(record: RunRecord) -> str:
    return line_plot(
        "memory", "Memory", [Series("peak so far", *column(record.train, "memory", GIB))], unit="GiB, peak"
    )


def _phases(record: RunRecord) -> str:
    bars = []
    for phase, value in mapping(mapping(record.summary).get("memory")).items():
        size = number(value)
        if size is not None:
            bars.append(Bar(_PHASES.get(str(phase), label(str(phase))), size, memory(size)))
    return bar_plot("phases", "Peak memory", bars, unit="by the end of each phase")


def _others(record: RunRecord) -> tuple[list[str], list[str], int]:
    """Plots of the numbers that are known by name, of every other one, and how many have none.

    Each shows training and held-out data in one; what every method has, the gradient's norm, comes last.
    """
    keys: dict[str, None] = {}
    for row in (*record.train, *record.evals):
        keys.update((key, None) for key, value in row.items() if key not in _KNOWN and number(value) is not None)
    known, taken = known_figures(record, list(keys))
    order = sorted((key for key in keys if key not in taken), key=lambda key: key == "grad_norm")
    plots = [
        metric_plot(record, f"metric-{i}", label(key), [(key, label(key))], zero=key == "grad_norm")
        for i, key in enumerate(order[:MOST])
    ]
    return known, plots, max(0, len(order) - MOST)
