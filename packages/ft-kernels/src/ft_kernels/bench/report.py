"""From times to rows, the bars they are held to, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ft_kernels.bench.harness import Case, Times

__all__ = ["SHARE", "judge", "mean_row", "rows_of", "table"]

# What the package promises on an H100 at the shapes of an 8B model; the README's numbers are held to the same.
SHARE = 0.85
SHARE_OPS = ("rms_norm", "layer_norm", "rope", "swiglu", "geglu", "cross_entropy")
SLOWER = 1.03
NF4_RATE = 2.65
OVER_FLOOR = {
    ("linear_cross_entropy", "both"): 1.25,
    ("lora_layer", "forward"): 1.08,
    ("lora_layer", "both"): 1.13,
    ("lora_layer_nf4", "forward"): 1.08,
    ("lora_layer_nf4", "both"): 1.13,
}
PEAK = {("linear_cross_entropy", "both"): 1.0}


def _pass_time(times: Times, which: str) -> float:
    value = getattr(times, which)
    return float(value) if value is not None else 0.0


def rows_of(
    case: Case, times: Mapping[str, Times], errors: Mapping[str, str], roof: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each pass of a case, and for both together; one row alone where ours failed."""
    base: dict[str, Any] = {"op": case.op, "model": case.model, "shape": case.shape}
    if errors:
        base["errors"] = dict(errors)
    ours = times.get("ours")
    if ours is None:
        return [{**base, "pass": "-"}]
    rows = []
    for which in (*case.passes, "both") if len(case.passes) > 1 else case.passes:
        milliseconds = _pass_time(ours, which)
        row = {
            **base,
            "pass": which,
            "ms": milliseconds,
            "spread": ours.spread,
            "first_s": ours.first,
            "split": case.split,
        }
        moved = sum(case.moved.get(p, 0) for p in case.passes) if which == "both" else case.moved.get(which, 0)
        flop = sum(case.flop.get(p, 0) for p in case.passes) if which == "both" else case.flop.get(which, 0)
        if moved:
            row |= {"TB/s": moved / milliseconds / 1e9, "share": moved / milliseconds / 1e9 / roof["copy"]}
        if flop and (case.split or which == "both"):
            row |= {"TFLOP/s": flop / milliseconds / 1e9, "share": flop / milliseconds / 1e9 / roof["product"]}
        if which == case.passes[-1] or which == "both":
            row["peak_GiB"] = ours.peak
        if "floor" in times and _pass_time(times["floor"], which):
            left_out = _pass_time(times["left out"], which) if "left out" in times else 0.0
            row["over_floor"] = (milliseconds - left_out) / _pass_time(times["floor"], which)
        others = {n: t for n, t in times.items() if n not in ("ours", "floor", "left out")}
        if case.split or which == "both":
            row["ratios"] = {name: _pass_time(other, which) / milliseconds for name, other in others.items()}
        row["others_ms"] = {name: _pass_time(t, which) for name, t in times.items() if name != "ours"}
        row["others_peak_GiB"] = {name: t.peak for name, t in times.items() if name != "ours"}
        rows.append(row)
    return rows


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean rate of nf4 dequantization over the weights of an 8B model, which is what its bar is about."""
    rates = [row["TB/s"] for row in rows if row["op"] == "nf4_dequantize" and row["model"] == "8b" and "TB/s" in row]
    if not rates:
        return None
    return {
        "op": "nf4_dequantize",
        "model": "8b",
        "shape": f"mean of {len(rates)}",
        "pass": "mean",
        "TB/s": sum(rates) / len(rates),
    }


def judge(row: Mapping[str, Any], tokens: int) -> list[str]:
    """What the row misses, in words; nothing for a row that meets its bars or has none."""
    missed = []
    if "ms" not in row and row["pass"] != "mean":
        return ["no result"]
    op, which, bars = row["op"], row["pass"], row["model"] == "8b"
    if bars and op in SHARE_OPS and which != "both" and tokens == 16384 and row.get("share", 1) < SHARE:
        missed.append(f"{row['share']:.0%} of the copy, not {SHARE:.0%}")
    if which == "mean" and row["TB/s"] < NF4_RATE:
        missed.append(f"{row['TB/s']:.2f} TB/s, not {NF4_RATE}")
    limit = OVER_FLOOR.get((op, which))
    if bars and limit and row.get("over_floor", limit) > limit:
        missed.append(f"{row['over_floor']:.3f} of the floor, not {limit}")
    if bars and (op, which) in PEAK and row["peak_GiB"] > PEAK[op, which]:
        missed.append(f"{row['peak_GiB']:.2f} GiB, not {PEAK[op, which]}")
    # Which kernel computes attention is picked for forward and backward together.
    compared = {} if op == "packed_attention" and which != "both" else row.get("ratios", {})
    for name, ratio in compared.items():
        if name != "eager" and ratio < 1 / SLOWER:
            missed.append(f"{1 / ratio - 1:.0%} slower than {name}")
    return missed


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column not in COLUMNS:
        ratio = row.get("ratios", {}).get(column)
        if ratio is not None:
            return f"{ratio:.2f}"
        return "error" if column in row.get("errors", {}) else "-"
    value = row.get(column)
    if value is None:
        return "-"
    if column in ("share", "spread"):
        return f"{value:.0%}"
    if column == "ms":
        return f"{value:.4f}" if value < 1 else f"{value:.3f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


COLUMNS = ("op", "model", "shape", "pass", "ms", "spread", "TB/s", "TFLOP/s", "share", "over_floor", "peak_GiB")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text. A ratio is the other's time divided by ours: above 1 is faster."""
    columns = [c for c in COLUMNS if any(c in row for row in rows)]
    columns += dict.fromkeys(name for row in rows for name in (*row.get("ratios", {}), *row.get("errors", {})))
    lines = [[*columns, "verdict"]]
    for row in rows:
        missed = row.get("missed", [])
        lines.append([*(_cell(row, c) for c in columns), "FAIL: " + "; ".join(missed) if missed else "pass"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )
