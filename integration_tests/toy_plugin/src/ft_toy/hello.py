"""``ft hello``."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="world")
    parser.add_argument("--fail", action="store_true", help="end with exit code 3")


def run(args: argparse.Namespace) -> int:
    print(f"hello, {args.name}")
    return 3 if args.fail else 0
