"""``ft models``: the model families that ft knows, and which parts of each run on ft_kernels."""

from __future__ import annotations

import argparse
import json
from typing import Any

__all__ = ["add_arguments", "run"]

PARTS = ("norms", "linears", "rotary", "activation", "head")
SIDES = {"whole": ("", ""), "language": (" of the language side", "; what sees or hears is transformers' own")}
"""Of which part of a model its layers are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """List every architecture in the registry; those that cannot be described say why."""
    from ft_core.installing import how_to_install
    from ft_core.plugins import EXTRAS, ArchitectureSpec, registry

    known = registry()
    rows = [_row(known.get(ArchitectureSpec, name)) for name in known.names(ArchitectureSpec.group)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    print("families whose layers ft computes with its own kernels; any other model of transformers trains on its own\n")
    for row in rows:
        parts = row["problem"] or (
            f"{', '.join(row['parts'])}{SIDES[row['side']][0]}: {'all' if row['fast'] else 'not all'} on the fast path"
            f"{SIDES[row['side']][1]}"
        )
        print(f"{row['name']:{width}}  {row['summary']}\n{'':{width}}  {parts}")
    absent: dict[str, list[str]] = {}
    for name, extra in EXTRAS[ArchitectureSpec.group].items():
        if name not in known.names(ArchitectureSpec.group):
            absent.setdefault(extra, []).append(name)
    for extra, names in absent.items():
        print(f"\nnot installed: {', '.join(names)} ({how_to_install(extra)})")
    return 0


def _row(spec: Any) -> dict[str, Any]:
    """What a family's layout says of the configuration that transformers has by default."""
    from ft_core.plugins import resolve

    row: dict[str, Any] = {"name": spec.name, "model_types": list(spec.model_types), "summary": spec.summary}
    if spec.parts:
        fast = {*spec.parts} >= {*PARTS} - {"rotary"}
        return {**row, "parts": [*spec.parts], "side": "whole", "fast": fast, "problem": None}
    try:
        from transformers import CONFIG_MAPPING

        layout = resolve(spec.describe)(CONFIG_MAPPING[spec.model_types[0]]())
    except Exception as error:
        return {**row, "parts": [], "fast": False, "side": "whole", "problem": f"cannot be described: {error}"}
    parts = [part for part in PARTS if part != "rotary" or layout.attention.rotary]
    side = "whole" if layout.body is None else "language"
    return {**row, "parts": parts, "side": side, "fast": len(parts) == len(PARTS), "problem": None}
