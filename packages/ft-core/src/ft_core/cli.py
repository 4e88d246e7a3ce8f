"""The command line: finds the command among the plugins, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 2 something the user can mend, said in one line; 130 interrupted; 1 a fault of ours, with its
traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ft_core import __version__
from ft_core.errors import FtError, PluginError
from ft_core.plugins import CommandSpec, registry

__all__ = ["main"]

ORDER = ("doctor", "plan", "train", "eval", "chat", "generate", "report", "merge", "export", "plugins")


AMOUNT = re.compile(r"-\.?\d")
"""How a negative amount begins, such as -3GiB; a number alone argparse knows to be none of the options."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, where argparse prints the usage too; and options may stand between ``key=value`` words."""

    takes_settings = False
    more_help: Callable[[], str] | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)  # an option that comes later would change what --typ means

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.more_help()}\n" if self.more_help is not None else "")

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        self.takes_settings |= settings.get("metavar") == "key=value"
        return super().add_argument(*names, **settings)

    def parse(self, words: list[str]) -> argparse.Namespace:
        words = _joined(words)
        try:
            return self.parse_intermixed_args(words)
        except TypeError:  # a third party's command with subcommands of its own, which cannot be intermixed
            return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        if unknown.startswith("-"):
            message += self._nearest(unknown.partition("=")[0])
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _nearest(self, word: str) -> str:
        """What may have been meant by an option that there is not."""
        bare = word.lstrip("-")
        options = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        begun = [option for option in options if bare and option.startswith(bare)]
        close = begun or difflib.get_close_matches(bare, options, 1)
        if close:
            return f"; did you mean {' or '.join(f'--{option}' for option in close)}?"
        return "; a setting is written without dashes, as key=value" if self.takes_settings else ""


def _joined(words: list[str]) -> list[str]:
    """Negative amounts joined to the option before them, whose value they are: argparse takes them for options."""
    joined: list[str] = []
    for number, word in enumerate(words):
        if word == "--":
            return joined + words[number:]
        before = joined[-1] if joined else ""
        if AMOUNT.match(word) and not _is_number(word) and before.startswith("--") and "=" not in before:
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ft`` with these words (the process's own where None) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = _run(words[0], words[1:])
        sys.stdout.flush()  # a reader that has gone is noticed here rather than when Python ends
        return code
    except FtError as error:
        print(f"ft {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`ft … | head`). What Python still holds would raise again when it is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(name: str, words: list[str]) -> int:
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        print(f"ft {__version__}")
        return 0
    if name.startswith("-"):
        raise PluginError(f"{name} is no option of ft: give a command first (see ft --help)")
    spec = registry().get(CommandSpec, name)
    try:
        module = importlib.import_module(spec.module)
        parser = _Parser(prog=f"ft {name}", description=spec.summary)
        module.add_arguments(parser)
        parser.more_help = getattr(module, "more_help", None)
    except FtError:
        raise
    except (Exception, SystemExit) as error:  # a third party's module may raise anything
        raise PluginError(f"the command {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    try:
        args = parser.parse(words)
    except SystemExit as stop:  # argparse has said what it had to say
        return int(stop.code or 0)
    return int(module.run(args) or 0)


def _overview() -> str:
    lines = ["usage: ft COMMAND …", "", "Fine-tune language models on the GPU you have.", ""]
    entries = registry().entries("ft.commands")
    own = sorted((e for e in entries if e.own), key=lambda e: ORDER.index(e.name) if e.name in ORDER else len(ORDER))
    for entry in own:
        try:
            summary = registry().load("ft.commands", entry.name).summary
        except PluginError as error:
            summary = f"(cannot be used: {error})"
        lines.append(f"  {entry.name:<10} {summary}")
    others = [e for e in entries if not e.own]
    if others:
        # A third party's module is not imported for the sake of a listing: what it costs is not known.
        lines += ["", "from other packages:", *(f"  {e.name:<10} of {e.source}" for e in others)]
    lines += ["", "ft COMMAND --help says more. Exit codes: 0 done, 2 to be mended by you, 130 interrupted, 1 a fault."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
