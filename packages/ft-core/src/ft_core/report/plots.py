"""Plots as inline SVG that keeps its shape: lines stretch with the page, text and strokes do not.

The lines are drawn in a stretched coordinate system with strokes of constant width; the labels are HTML beside it, so
they are as legible on a telephone as on a wide screen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from ft_core.report.numbers import MINUS, plain
from ft_core.report.series import Axis, downsample, linear_axis, log_axis

__all__ = ["Bar", "Series", "Style", "bar_plot", "line_plot"]

WIDTH, HEIGHT = 1000, 400
"""The stretched coordinate system, in units that mean nothing outside it."""


Style = Literal["line", "second", "third", "fourth", "fifth", "faint", "points"]
"""How a series is drawn: lines that colour and dashes tell apart, one that stays behind the others, or points."""


@dataclass(frozen=True)
class Series:
    """One line or set of points: ``y`` (None, NaN, infinity: a gap) over ``x`` (steps)."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: Style = "line"


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its length (any unit), and how to print that."""

    label: str
    value: float
    text: str


def _short(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{plain(value / 1e6, 3)}M"
    if abs(value) >= 1e4:
        return f"{plain(value / 1e3, 3)}k"
    return plain(value, 3)


def _path(points: Sequence[tuple[float, float | None]], across: Axis, up: Axis) -> str:
    """SVG path data, broken at gaps. A lone point is a line of no length, which round caps make a dot."""
    words: list[str] = []
    pen = False
    for i, (x, y) in enumerate(points):
        if y is None or (up.log and y <= 0):
            pen = False
            continue
        place = f"{across.place(x) * WIDTH:.1f} {(1 - up.place(y)) * HEIGHT:.1f}"
        words.append(f"{'L' if pen else 'M'}{place}")
        last = i + 1 == len(points) or points[i + 1][1] is None
        if not pen and last:
            words.append("h0")
        pen = True
    return "".join(words)


def _dots(points: Sequence[tuple[float, float | None]], across: Axis, up: Axis) -> str:
    return "".join(_path([point], across, up) for point in points)


def _up(values: Sequence[float], zero: bool) -> Axis:
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if zero and low > 0 and high > 50 * middle:
        return log_axis(low, high)  # a spike, or a fall of orders of magnitude, leaves a linear plot empty
    if zero and low >= 0:
        low = 0.0
        high = high or 1.0
    return linear_axis(low, high)


def line_plot(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    zero: bool = True,
    show: Callable[[float], str] = plain,
    marks: Sequence[float] = (),
    marks_label: str = "",
    wide: bool = False,
) -> str:
    """A figure of lines over steps.

    Args:
        name: an id, unique on the page.
        title: the heading; ``unit`` follows it.
        series: at least one of them with a finite value, or the result is empty.
        zero: begin the axis at zero where no value is negative (logarithmic where values span too much for that).
        show: how a value is printed in the description.
        marks: steps to mark at the foot, with ``marks_label`` in the legend.
        wide: for the full width of the page.
    """
    thin = [(s, downsample(s.x, s.y)) for s in series]
    thin = [(s, points) for s, points in thin if any(y is not None for _, y in points)]
    if not thin:
        return ""
    steps = [x for _, points in thin for x, _ in points] + list(marks)
    across = linear_axis(min(steps), max(steps), about=5, whole=True, tight=True)
    up = _up([y for _, points in thin for _, y in points if y is not None], zero)
    shapes = [f'<path class="grid" d="{_rules(up)}"/>']
    for s, points in thin:
        data = _dots(points, across, up) if s.style == "points" else _path(points, across, up)
        if s.style == "points":  # a ring of the page's colour keeps points apart from the line below them
            shapes.append(f'<path class="halo" d="{data}"/>')
        shapes.append(f'<path class="{s.style}" d="{data}"/>')
    if marks:
        at = sorted({round(across.place(m) * WIDTH) for m in marks})
        shapes.append(f'<path class="mark" d="{"".join(f"M{x} {HEIGHT}v-24" for x in at)}"/>')
    legend = [(s.style, s.label) for s, _ in thin] + ([("mark", marks_label)] if marks else [])
    note = ", logarithmic" if up.log else ""
    return _figure(
        name,
        title,
        f"{unit}{note}".removeprefix(", "),
        legend if len(legend) > 1 else [],
        _frame(name, title, _describe(thin, show), shapes, across, up),
        _data(thin, across, up),
        wide,
    )


def _rules(up: Axis) -> str:
    return "".join(f"M0 {(1 - up.place(t)) * HEIGHT:.1f}H{WIDTH}" for t in up.ticks)


def _describe(thin: Sequence[tuple[Series, Sequence[tuple[float, float | None]]]], show: Callable[[float], str]) -> str:
    parts = []
    for s, points in thin:
        known = [(x, y) for x, y in points if y is not None]
        (x0, y0), (x1, y1) = known[0], known[-1]
        low, high = min(y for _, y in known), max(y for _, y in known)
        parts.append(
            f"{s.label}: {show(y0)} at step {plain(x0, 9)}, {show(y1)} at step {plain(x1, 9)}, "
            f"lowest {show(low)}, highest {show(high)}."
        )
    return " ".join(parts)


def _data(thin: Sequence[tuple[Series, Sequence[tuple[float, float | None]]]], across: Axis, up: Axis) -> str:
    """What the read-out under the pointer needs, for the page's script."""
    rows = [
        {
            "label": s.label,
            "style": s.style,
            "x": [round(x) if x == round(x) else x for x, y in points if y is not None],
            "y": [float(f"{y:.5g}") for _, y in points if y is not None],
        }
        for s, points in thin
    ]
    body = {"x": [across.low, across.high], "y": [up.low, up.high], "log": up.log, "series": rows}
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _frame(name: str, title: str, description: str, shapes: Sequence[str], across: Axis, up: Axis) -> str:
    # One precision for the whole axis, so that its labels line up.
    labels = [_short(t) for t in up.ticks]
    if not up.log and all(abs(t) < 1e4 for t in up.ticks) and all("e" not in text for text in labels):
        decimals = max((len(text.partition(".")[2]) for text in labels), default=0)
        labels = [f"{t:,.{decimals}f}".replace("-", MINUS) for t in up.ticks]
    ups = "".join(
        f'<span style="bottom:{up.place(t) * 100:.2f}%">{text}</span>' for t, text in zip(up.ticks, labels, strict=True)
    )
    acrosses = "".join(
        f'<span style="left:{across.place(t) * 100:.2f}%"{_edge(across.place(t))}>{_short(t)}</span>'
        for t in across.ticks
    )
    return (
        f'<div class="plot" style="--gutter:{max(map(len, labels))}ch">'
        f'<div class="up" aria-hidden="true">{ups}</div>'
        f'<div class="area"><svg role="img" aria-labelledby="{name}-t {name}-d" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(description)}</desc>{"".join(shapes)}</svg></div>'
        f'<div class="across" aria-hidden="true">{acrosses}<span class="name">step</span></div></div>'
    )


def _edge(place: float) -> str:
    """The class that keeps the label of an end from reaching past the plot."""
    if place > 0.97:
        return ' class="end"'
    return ' class="start"' if place < 0.03 else ""


def _figure(
    name: str, title: str, unit: str, legend: Sequence[tuple[str, str]], body: str, data: str, wide: bool
) -> str:
    keys = "".join(f'<li><i class="key {style}"></i>{escape(label)}</li>' for style, label in legend)
    return (
        f'<figure id="{name}"{" class=wide" if wide else ""}><figcaption><b>{escape(title)}</b>'
        f"{f' <span>{escape(unit)}</span>' if unit else ''}"
        f"{f'<ul class=legend>{keys}</ul>' if keys else ''}</figcaption>{body}{data}</figure>"
    )


def bar_plot(name: str, title: str, bars: Sequence[Bar], *, unit: str = "") -> str:
    """A figure of horizontal bars from zero, each with its name and its value beside it; empty without a bar."""
    bars = [bar for bar in bars if math.isfinite(bar.value) and bar.value >= 0]
    if not bars:
        return ""
    longest = max(bar.value for bar in bars) or 1.0
    description = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    rows = []
    for i, bar in enumerate(bars):
        share = bar.value / longest * WIDTH
        label = f' role="img" aria-labelledby="{name}-t {name}-d"' if i == 0 else ' aria-hidden="true"'
        titles = (
            f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
            if i == 0
            else ""
        )
        rows.append(
            f'<div class="bar"><span aria-hidden="true">{escape(bar.label)}</span>'
            f'<svg{label} viewBox="0 0 {WIDTH} 10" preserveAspectRatio="none">{titles}'
            f'<rect class="track" width="{WIDTH}" height="10"/>'
            f'<rect class="fill" width="{share:.1f}" height="10"/></svg>'
            f'<span class="value" aria-hidden="true">{escape(bar.text)}</span></div>'
        )
    return _figure(name, title, unit, [], f'<div class="bars">{"".join(rows)}</div>', "", False)
