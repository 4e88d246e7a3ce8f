"""Memory against the length of a row, as a figure: python benchmarks/plot_memory.py [--out docs/memory.svg]

Draws the rows of benchmarks/results/long_context.jsonl that were made with --lengths, the newest of each contestant and
length: GiB at the peak over tokens, both on logarithmic axes, each line named at its end. Of ft that of one of its ways
(--way). What ran out of memory ends its line with a cross.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import cases

RESULTS = cases.FOLDER / "long_context.jsonl"
OUT = Path(__file__).parents[1] / "docs" / "memory.svg"
NAMES = {"ft": "ft", "unsloth": "Unsloth", "transformers": "transformers + PEFT"}
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 56, 170, 44, 48
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 } .title { font-size: 15px; font-weight: 600 }
.grid { stroke: #ddd; stroke-width: 1 } .line { fill: none; stroke-width: 2.5; stroke-linejoin: round }
.s0 { stroke: #0b6e4f } .s1 { stroke: #c1560f } .s2 { stroke: #5b5f97 }
.t0 { fill: #0b6e4f } .t1 { fill: #c1560f } .t2 { fill: #5b5f97 }
@media (prefers-color-scheme: dark) {
  text { fill: #ccc } .grid { stroke: #444 }
  .s0 { stroke: #4cc38a } .s1 { stroke: #f5a15c } .s2 { stroke: #a3a7e6 }
  .t0 { fill: #4cc38a } .t1 { fill: #f5a15c } .t2 { fill: #a3a7e6 }
}
"""

Points = dict[int, float | None]
"""GiB by tokens; None where memory ran out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", default="offload/4096", help="of ft")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = cases.read(args.results)
    found = series(rows, args.way)
    if not found:
        parser.error(f"no rows made with --lengths in {args.results}")
    args.out.write_text(drawn(found, about(rows)), encoding="utf-8")
    print(f"{args.out}: {', '.join(f'{name} {len(points)}' for name, points in found.items())}")


def series(rows: Sequence[dict[str, Any]], way: str) -> dict[str, Points]:
    """Of each contestant the newest row of each length; later rows of a file are newer."""
    found: dict[str, Points] = {}
    for row in rows:
        if row.get("mode") != "lengths" or (row["contestant"] == "ft" and row["way"] != way):
            continue
        points = found.setdefault(NAMES[row["contestant"]], {})
        if "error" not in row:
            points[row["tokens"]] = row["peak_gib"]
        elif row.get("out_of_memory"):
            points[row["tokens"]] = None
    order = list(NAMES.values())
    whole = {name: points for name, points in found.items() if any(value for value in points.values())}
    return {name: dict(sorted(whole[name].items())) for name in sorted(whole, key=order.index)}


def about(rows: Sequence[dict[str, Any]]) -> str:
    """On which card, and when."""
    last = [row for row in rows if row.get("mode") == "lengths"][-1]
    return f"Llama 3.1 8B, nf4, LoRA r={last['rank']}, one row; {last['gpu']}, {last['date'][:10]}"


def drawn(found: dict[str, Points], note: str) -> str:
    """The figure."""
    values = [value for points in found.values() for value in points.values() if value]
    lengths = sorted({tokens for points in found.values() for tokens in points})
    low, high = 2 ** math.floor(math.log2(min(values))), 2 ** math.ceil(math.log2(max(values) * 1.001))
    first, last = lengths[0], max(lengths[-1], lengths[0] + 1)

    def across(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(tokens / first) / math.log(last / first)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(value / low) / math.log(high / low)

    parts = [f'<text class="title" x="{LEFT}" y="20">Memory at the peak of a step, GiB</text>']
    value = float(low)
    while value <= high:
        parts.append(f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        value *= 2
    for tokens in lengths:
        parts.append(
            f'<text x="{across(tokens):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tokens:,}</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">tokens. {escape(note)}</text>')
    places: list[float] = []
    for number, (name, points) in enumerate(found.items()):
        known = [(across(tokens), up(value)) for tokens, value in points.items() if value]
        words = "L".join(f"{x:.1f} {y:.1f}" for x, y in known)
        parts.append(f'<path class="line s{number}" d="M{words}"/>')
        parts += [f'<circle class="t{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in known]
        missing = [tokens for tokens, value in points.items() if value is None]
        if missing:
            x, y = across(min(missing)), TOP
            parts.append(f'<path class="line s{number}" d="M{x - 5:.1f} {y - 5}l10 10m-10 0l10 -10"/>')
        x, y = known[-1]
        while any(abs(y - other) < 16 for other in places):  # names keep apart
            y += 4
        places.append(y)
        said = f"{name}, out of memory at {min(missing):,}" if missing else name
        parts.append(f'<text class="t{number}" x="{x + 10:.1f}" y="{y + 4:.1f}">{escape(said)}</text>')
    told = "; ".join(f"{name}: {_described(points)}" for name, points in found.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">'
        f'<title id="t">Memory against the length of a row</title><desc id="d">{escape(told)}</desc>'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _described(points: Points) -> str:
    return ", ".join(
        f"{tokens:,} tokens {f'{value:.1f} GiB' if value else 'out of memory'}" for tokens, value in points.items()
    )


if __name__ == "__main__":
    main()
