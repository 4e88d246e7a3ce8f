"""``ft eval RUN``"""

from __future__ import annotations

import argparse
import json

from ft_core.commands.arguments import count, count_or_none

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run folder")
    parser.add_argument("--data", metavar="FILE", help="rows to measure on, instead of those kept from training")
    parser.add_argument("--limit", type=count, metavar="N", help="at most N rows; a fuller measurement is not replaced")
    parser.add_argument("--answers", type=count_or_none, metavar="N", help="generate at most N answers")
    parser.add_argument("--ignore-case", action="store_true", help="compare answers without regard to case")
    parser.add_argument(
        "--whitespace",
        choices=("collapse", "strip", "keep"),
        help="compare answers with runs of white space as one space, without any at the ends, or as they are",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
    from ft_core.data.reading import check_sources
    from ft_core.plugins import MethodSpec, registry
    from ft_core.runs import Run
    from ft_core.training.modality import of_modality

    folder = Run.open(args.run)  # a wrong path is said before anything heavy is imported
    if args.data is not None:
        formats = registry().get(MethodSpec, folder.config.method).formats
        check_sources(args.data, formats, of_modality(folder.config, "rows"))
    from ft_core.console import progress, quiet, say

    quiet()
    from ft_core.evaluation import evaluate, table

    show = {}

    def shown(done: int, total: int, what: str) -> None:
        if done == 0:
            show[what] = progress(what)
        show[what](done, total)

    compared = {"ignore_case": args.ignore_case or None, "whitespace": args.whitespace}
    comparison = evaluate(
        args.run,
        data=args.data,
        limit=args.limit,
        answers=args.answers,
        compared={name: value for name, value in compared.items() if value is not None},
        say=say,
        progress=shown,
    )
    print(json.dumps(comparison, ensure_ascii=False, indent=1) if args.json else table(comparison))
    return 0
