"""``ft report RUN``: write a run's report again."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder that ft train wrote (its `output`)")


def run(args: argparse.Namespace) -> int:
    """Rewrite ``RUN/report.html`` and print its path.

    Raises:
        RunError: RUN is missing, is no run folder, is of a newer format, or cannot be written to.
    """
    from ft_core.report import write_report

    print(write_report(args.run))
    return 0
