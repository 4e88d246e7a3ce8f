"""``ft bench CONFIG``: how fast a configuration trains on this machine, part by part."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ft_core.commands.arguments import count

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a configuration of ft train; nothing is kept")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of CONFIG")
    parser.add_argument("--steps", type=count, default=10, help="steps to time, after three (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the parts of a step, tokens a second and the peak of memory.

    Raises:
        FtError: as `ft train`.
    """
    from ft_core import console
    from ft_core.config import load_config
    from ft_core.training.timing import PARTS, time_steps

    console.quiet()
    config = load_config(args.config, args.overrides)
    timing = time_steps(config, args.steps, say=console.say)
    if args.json:
        print(json.dumps(timing.as_json(), indent=2))
        return 0
    for part in PARTS:
        print(f"{part:10} {timing.seconds[part] * 1e3:10.1f} ms  {timing.seconds[part] / timing.step:5.0%}")
    print(
        f"{'step':10} {timing.step * 1e3:10.1f} ms  {timing.tokens / timing.step:.0f} tokens a second "
        f"({timing.tokens:.0f} a step)"
    )
    print(
        f"peak memory {timing.memory / 2**30:.2f} GiB; loaded in {timing.load_seconds:.1f} s, first step "
        f"{timing.first_seconds:.1f} s; {'fast layers' if timing.fast else 'plain layers'}"
    )
    return 0
