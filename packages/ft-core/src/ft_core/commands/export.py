"""``ft export RUN --to TARGET``: hands a run, or a model's or adapter's folder, to the exporter of that name."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from ft_core.errors import ConfigError

__all__ = ["add_arguments", "more_help", "run"]

OTHERS = ("config.json", "adapter_config.json")
"""A file of what is no run and can be exported: a model's or an adapter's folder."""
NAMED = 14
"""Columns for the names in the list of targets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run folder; or a transformers model's, or a PEFT adapter's")
    parser.add_argument("--to", required=True, metavar="TARGET", help="the form to write, such as gguf: see below")
    parser.add_argument(
        "--type", metavar="TYPE", help="the number format, such as f16 or q8_0; a target's first is its default"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to; unset means RUN/export/TARGET")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--skip-proof", action="store_true", help="do not check the result in its engine (gguf)")
    parser.add_argument(
        "--converter", metavar="PATH", help="as converter=PATH: llama.cpp's own converter, for gguf (it is run)"
    )
    parser.add_argument("options", nargs="*", default=[], metavar="key=value", help="further settings of the target")


def more_help() -> str:
    """The targets that are installed, what each takes, and how to get those that are not.

    Of another package's target only the name is said: what importing it costs is not known.
    """
    from ft_core.errors import PluginError
    from ft_core.installing import how_to_install
    from ft_core.plugins import ExporterSpec, registry

    found = registry()
    entries = found.entries(ExporterSpec.group)
    lines = ["targets, and the key=value settings of each:"]
    for entry in (entry for entry in entries if entry.own):
        try:
            spec = found.get(ExporterSpec, entry.name)
        except PluginError as error:
            lines += ["", f"  {entry.name}: cannot be used: {error}"]
            continue
        lines += ["", f"  {spec.name}: {spec.summary}"]
        if spec.types:
            lines += _wrapped("--type", ", ".join(spec.types))
        for key, what in spec.options.items():
            lines += _wrapped(f"{key}=", what)
    if not any(entry.own for entry in entries):
        lines += ["", f"  none of ft's own is installed: {how_to_install('export')}"]
    lines += [f"  {entry.name}: of {entry.source}" for entry in entries if not entry.own]
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    indent = " " * (6 + NAMED)
    return textwrap.wrap(
        f"{name:<{NAMED}}{text}", 100, initial_indent=" " * 6, subsequent_indent=indent, break_on_hyphens=False
    )


def run(args: argparse.Namespace) -> int:
    from ft_core.plugins import ExporterSpec, ExportRequest, ExportResult, registry, resolve
    from ft_core.runs import Run

    spec = registry().get(ExporterSpec, args.to)
    folder = Path(args.run).expanduser()
    if (folder / Run.ENVIRONMENT).exists() or not any((folder / name).is_file() for name in OTHERS):
        folder = Run.open(args.run).path
    kind = args.type or (spec.types[0] if spec.types else None)
    if kind is not None and kind.lower() in spec.types:
        kind = kind.lower()  # llama.cpp writes Q4_K_M
    if kind is not None and kind not in spec.types:
        allowed = ", ".join(spec.types) or "none, it has only one form"
        raise ConfigError(f"--type {kind} is not allowed for {args.to} (allowed: {allowed})")
    options = {}
    for word in args.options:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is no setting: write key=value")
        options[key] = value
    if args.converter is not None:
        if "converter" in options:
            raise ConfigError("converter= and --converter are the same setting: leave one out")
        options["converter"] = args.converter
    from ft_core.console import quiet

    quiet()
    request = ExportRequest(
        run=folder,
        out=args.out or folder / "export" / args.to,
        type=kind,
        overwrite=args.overwrite,
        options=options,
        skip_proof=args.skip_proof,
    )
    result: ExportResult = resolve(spec.export)(request)
    for line in result.checks:
        print(line)
    for file in result.files:
        print(f"wrote {file}")
    if result.next_command:
        print(f"next: {result.next_command}")
    return 0
