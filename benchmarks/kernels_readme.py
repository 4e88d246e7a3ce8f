"""Put the kernels' numbers into their README. Run: python benchmarks/kernels_readme.py

Takes the newest line of each measurement in benchmarks/results/kernels.jsonl (``nox -s bench`` adds to it) at the
shapes of the 8B model and rewrites what is between the two marks in packages/ft-kernels/README.md. Nothing there is
typed by hand; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/kernels.jsonl"
README = ROOT / "packages/ft-kernels/README.md"
BEGIN, END = "<!-- numbers: benchmarks/kernels_readme.py -->", "<!-- end of numbers -->"

Row = dict[str, Any]


def newest(lines: list[str]) -> list[Row]:
    """The last row of each measurement on the GPU that was measured last, in the order of their first appearance.

    A shape that the operation's last measurement no longer had is left out: it was renamed or dropped.
    """
    rows = [json.loads(line) for line in lines if line.strip()]
    rows = [row for row in rows if row["gpu"] == rows[-1]["gpu"] and row["model"] == "8b" and "op" in row]
    last = {row["op"]: row["date"] for row in rows}
    rows = [row for row in rows if row["date"] == last[row["op"]]]
    return list({(row["op"], row["shape"], row["pass"]): row for row in rows}.values())


def text(rows: list[Row]) -> str:
    """What belongs between the marks."""
    last = max(rows, key=lambda row: row["date"])
    roof = last["roofline"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    dates = sorted({row["date"][:10] for row in rows})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    lines = [
        f"{last['gpu']}, {when}, {versions}. In the same run a device copy moved {roof['copy']:.2f} TB/s and a bf16 "
        f"product of 8192³ ran at {roof['product']:.0f} TFLOP/s.",
        "",
        "| operation | forward | backward | torch | torch.compile | others |",
        "|---|---|---|---|---|---|",
    ]
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "ms" in row:
            by_case.setdefault((row["op"], row["shape"]), {})[row["pass"]] = row
    for (op, shape), passes in by_case.items():
        whole = passes.get("both") or passes["forward"]
        ratios = dict(whole.get("ratios", {}))
        first = [f"{ratios.pop(name):.2f}" if name in ratios else "" for name in ("eager", "compile")]
        others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        cells = [_pass(passes.get(which)) for which in ("forward", "backward")]
        lines.append("| " + " | ".join([f"`{op}` {shape}", *cells, *first, others]) + " |")
    notes = [note for passes in by_case.values() for note in _notes(passes)]
    means = [row for row in rows if row["pass"] == "mean"]
    notes += [f"- `{row['op']}`, {row['shape']} weights: {row['TB/s']:.2f} TB/s." for row in means]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _pass(row: Row | None) -> str:
    if row is None:
        return ""
    rates = [f", {row[unit]:{form}} {unit}" for unit, form in (("TB/s", ".2f"), ("TFLOP/s", ".0f")) if unit in row]
    share = f" ({row['share']:.0%})" if "share" in row else ""
    return f"{row['ms']:.3f} ms{''.join(rates)}{share}"


def _notes(passes: dict[str, Row]) -> list[str]:
    """What an operation costs beyond the products that it cannot do without."""
    row = passes.get("both") or passes["forward"]
    if "over_floor" not in row:
        return []
    forward = f"forward {passes['forward']['over_floor']:.3f}, " if row["split"] else ""
    return [
        f"- `{row['op']}` {row['shape']}, as a multiple of its bare products: {forward}"
        f"forward and backward {row['over_floor']:.3f}; {row['peak_GiB']:.2f} GiB beyond inputs and gradients."
    ]


def main() -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    numbers = text(newest(RESULTS.read_text(encoding="utf-8").splitlines()))
    README.write_text(f"{before}{BEGIN}\n{numbers}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
