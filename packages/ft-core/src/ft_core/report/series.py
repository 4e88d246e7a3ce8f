"""Series of points for plots: thinning that keeps every peak, smoothing, axes with round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "downsample", "linear_axis", "log_axis", "smooth"]

Points = list[tuple[float, float | None]]


def downsample(xs: Sequence[float], ys: Sequence[float | None], limit: int = 1000) -> Points:
    """Thin a series to about ``limit`` points; None, NaN and infinities become gaps (None).

    A long series is cut into ``limit / 2`` buckets of equal count, and each gives its lowest and its highest point, in
    their order, so every peak stays; a bucket with a gap in it ends in one. At most 1.5 times ``limit`` points.
    """
    clean = [y if y is not None and math.isfinite(y) else None for y in ys]
    total = len(clean)
    if total <= limit:
        return list(zip(xs, clean, strict=True))
    points: Points = []
    buckets = limit // 2
    for bucket in range(buckets):
        start, stop = bucket * total // buckets, (bucket + 1) * total // buckets
        known = [(y, i) for i in range(start, stop) if (y := clean[i]) is not None]
        if known:
            ends = sorted({min(known)[1], max(known)[1]})
            points += [(xs[i], clean[i]) for i in ends]
        if len(known) < stop - start:
            points.append((xs[stop - 1], None))
    return points


def smooth(ys: Sequence[float | None], span: float) -> list[float | None]:
    """Exponential moving average, run forwards and then backwards over the result, so that it does not lag.

    Each pass has weights that fall by ``1 - 2 / (span + 1)`` a point, with bias correction (Kingma and Ba,
    arXiv:1412.6980, section 3). A value that is no finite number is a gap and has no weight.
    """
    return _average(_average(ys, span)[::-1], span)[::-1]


def _average(ys: Sequence[float | None], span: float) -> list[float | None]:
    keep = 1 - 2 / (span + 1)
    mean = weight = 0.0
    out: list[float | None] = []
    for y in ys:
        if y is None or not math.isfinite(y):
            out.append(None)
            continue
        mean = keep * mean + (1 - keep) * y
        weight = keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


@dataclass(frozen=True)
class Axis:
    """A range of values, where its ticks are, and whether it is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between the ends, as a share from 0 to 1."""
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(value)
        else:
            low, high = self.low, self.high
        return (value - low) / (high - low)


def linear_axis(low: float, high: float, *, about: int = 4, whole: bool = False, tight: bool = False) -> Axis:
    """An axis over ``low`` to ``high`` with ticks at 1, 2, 2.5 or 5 times a power of ten.

    Args:
        about: how many intervals to aim for.
        whole: ticks at whole numbers only.
        tight: end at the data instead of the next tick.
    """
    if high <= low:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
        if low < 0 <= low + pad:  # a single value that is not negative needs no negative axis
            low = 0.0
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * 0.999), 10 * power)
    if whole:
        step = float(max(1, math.ceil(step)))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    if tight:
        inside = [t for t in ticks if low - step * 1e-9 <= t <= high + step * 1e-9]
        return Axis(low, high, tuple(inside))
    return Axis(ticks[0], ticks[-1], tuple(ticks))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis over positive values, with ticks at powers of ten, or at 1, 2 and 5 where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first > 2:
        every = math.ceil((last - first) / 6)
        powers = range(first, last + 1, every)
        return Axis(10.0**first, 10.0**last, tuple(10.0**p for p in powers), log=True)
    ticks = [m * 10.0**p for p in range(first, last) for m in (1, 2, 5)] + [10.0**last]
    lowest = max(i for i, t in enumerate(ticks) if t <= low * (1 + 1e-9))
    highest = min(i for i, t in enumerate(ticks) if t >= high * (1 - 1e-9))
    if highest == lowest:
        highest = min(highest + 1, len(ticks) - 1)
        lowest = max(0, highest - 1)
    kept = ticks[lowest : highest + 1]
    return Axis(kept[0], kept[-1], tuple(kept), log=True)
