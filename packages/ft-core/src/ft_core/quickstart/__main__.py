"""``python -m ft_core.quickstart``: from no data to a file that llama.cpp runs, by the commands of ``ft``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from ft_core.cli import main as ft
from ft_core.console import say
from ft_core.errors import FtError
from ft_core.quickstart.dates import make

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ft_core.quickstart", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("quickstart-run"), help="a folder for all of it")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart in that folder")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except FtError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    folder = args.out.resolve()
    _check(folder, overwrite=args.overwrite)
    say("making dates in eight languages")
    make(folder / "data")
    shutil.copyfile(Path(__file__).with_name("dates.yaml"), folder / "dates.yaml")
    os.chdir(folder)
    commands = [
        ["train", "dates.yaml", f"training.max_steps={args.steps}", *(["--overwrite"] if args.overwrite else [])],
        ["eval", "run"],
        ["merge", "run"],
        ["export", "run", "--to", "gguf"],
    ]
    for words in commands:
        say(f"\n$ ft {' '.join(words)}")
        code = ft(words)
        if code:
            return code
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text(encoding="utf-8"))
    exact = evaluation["metrics"]["exact_match"]
    gguf = sorted((folder / "run" / "export" / "gguf").glob("*.gguf"))
    rows = [
        ("exact match", f"{100 * exact['before']:.0f} % before, {100 * exact['after']:.0f} % after"),
        ("report", folder / "run" / "report.html"),
        ("adapter", folder / "run" / "adapter"),
        ("merged model", folder / "run" / "merged"),
        ("GGUF", gguf[0] if gguf else "none"),
        ("took", f"{time.monotonic() - start:.0f} s"),
    ]
    print()
    for name, value in rows:
        print(f"{name:<14}{value}")
    words = [shlex.quote(str(word)) for word in (_program(), "chat", folder / "run")]
    print(f'next          {" ".join(words)} --system "Write the date in ISO 8601 form."')
    return 0


def _check(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds other files, or an earlier quickstart that is not to be replaced."""
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # Of hidden files only a run that a killed --overwrite moved aside counts: systems and ft leave others (.DS_Store).
    found = {name for name in found if not name.startswith(".") or name == ".run.old"}
    others = sorted(found - {"data", "dates.yaml", "run", ".run.old"})
    if others:
        raise FtError(f"{folder} holds other files ({others[0]}, …): give another folder with --out")
    if found and not overwrite:
        raise FtError(f"{folder} holds a quickstart already: give --overwrite, or another folder with --out")


def _program() -> Path | str:
    """The command to type: its path, for the environment that this runs in need not be the shell's."""
    beside = Path(sys.executable).with_name("ft")
    return beside if beside.is_file() else "ft"


if __name__ == "__main__":
    sys.exit(main())
