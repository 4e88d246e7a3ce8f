"""``ft plugins``: what is installed, and what of it cannot be used."""

from __future__ import annotations

import argparse
import json

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from ft_core.plugins import GROUPS, registry

    found = registry()
    problems = found.check()
    broken = {problem.entry: problem.reason for problem in problems}
    if args.json:
        rows = [
            {
                "group": e.group,
                "name": e.name,
                "package": e.distribution,
                "version": e.version,
                "problem": broken.get(e),
            }
            for group in GROUPS
            for e in found.entries(group)
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for group in GROUPS:
        entries = found.entries(group)
        if not entries:
            continue
        print(group)
        for entry in entries:
            summary = "cannot be used, see below" if entry in broken else found.load(group, entry.name).summary
            print(f"  {entry.name:<13} {entry.source:<18} {summary}")
    if problems:
        print("\ncannot be used:")
        for problem in problems:
            print(f"  {problem.entry.name} ({problem.entry.group}) of {problem.entry.source}: {problem.reason}")
    return 0
