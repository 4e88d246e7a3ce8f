"""``ft transcribe RUN FILE …``: what is said in recordings, written down."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.commands.arguments import count
from ft_core.errors import DataError, FtError, RunError
from ft_speech.listening.formats import FORMATS, as_row, document, srt, text, vtt

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ft_speech.listening.progress import Shown
    from ft_speech.listening.recogniser import Recogniser
    from ft_speech.listening.transcripts import Transcript

__all__ = ["add_arguments", "more_help", "run"]

TIMED = ("srt", "vtt")
"""Formats that are nothing without times."""

TOGETHER = 4
"""Recordings are read until so many batches of windows are there: enough for all to be full but the last."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ft_speech.listening.recogniser import LONG_FORMS, TASKS, TIMESTAMPS

    parser.add_argument("run", metavar="RUN", help="a run folder, or a model: a folder or a Hub name")
    parser.add_argument("files", metavar="FILE", nargs="+", help="audio files, and folders of them")
    parser.add_argument("--language", help="what is spoken, such as en or English; unset, each file's beginning tells")
    parser.add_argument(
        "--task", choices=TASKS, default="transcribe", help="transcribe (the default), or translate into English"
    )
    parser.add_argument(
        "--timestamps",
        choices=TIMESTAMPS,
        help="segment is the default of srt, vtt, json and jsonl; word where the model follows words",
    )
    parser.add_argument("--format", choices=FORMATS, help="the default is by --out's ending, or txt")
    parser.add_argument("--json", action="store_true", help="the same as --format json")
    parser.add_argument("--out", metavar="PATH", help="a file for all, or a folder for a file each")
    parser.add_argument("--overwrite", action="store_true", help="write anew what is there already")
    parser.add_argument("--prompt", help="names and words to expect, or a text in the spelling that is wanted")
    parser.add_argument(
        "--long-form",
        choices=LONG_FORMS,
        default="pauses",
        help="long files: cut at pauses (the default), or heard in one pass, each window from the last timestamp on",
    )
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="windows heard together (8)")
    parser.add_argument("--max-new-tokens", type=count, metavar="N", help="the longest text of a window")


def more_help() -> str:
    return "A file that cannot be used is named, the others are written down, and the exit code is 2."


@dataclass
class _Item:
    """A file of the command's.

    Attributes:
        path: as it was given, or found in a folder. relative: its path in that folder.
        out: the file of its own that it is written to.
    """

    path: Path
    relative: Path
    out: Path | None = None
    seconds: float = 0.0
    transcript: Transcript | None = None


@dataclass
class _Plan:
    """What is to be written where.

    Attributes:
        file: of all transcripts, or None. folder: of one file each, or None. Neither: they are printed.
    """

    format: str
    timestamps: Any
    file: Path | None = None
    folder: Path | None = None
    items: list[_Item] = field(default_factory=list)
    faults: int = 0


def run(args: argparse.Namespace) -> int:
    from ft_core.console import counted, quiet, say
    from ft_core.models.opening import check_reference

    plan = _planned(args)
    check_reference(args.run)
    for one in args.files:
        plan.items += _found(Path(one), plan)
    if not plan.items:
        return 2
    _place(plan, args.overwrite)
    left = [item for item in plan.items if args.overwrite or item.out is None or not item.out.exists()]
    there = len(plan.items) - len(left)
    if there:
        say(f"{there} of {counted(len(plan.items), 'file')} are there already (--overwrite writes them anew)")
    if left:
        quiet()
        _transcribe(args, plan, left)
    if plan.folder is not None:
        print(f"{counted(len(plan.items) - plan.faults, 'transcript')} in {plan.folder}")
    return 2 if plan.faults else 0


def _fault(plan: _Plan, error: object) -> None:
    from ft_core.console import say

    plan.faults += 1
    say(f"ft transcribe: {error}")


# -- what is asked for ---------------------------------------------------------------------------------------------


def _planned(args: argparse.Namespace) -> _Plan:
    """The form and the place of what will be written, as far as the options say.

    Raises:
        DataError: options that do not go together.
    """
    out = None if args.out is None else Path(args.out)
    if args.overwrite and out is None:
        raise DataError("--overwrite is of --out, which is not given: the transcripts are printed")
    if args.json and args.format not in (None, "json"):
        raise DataError(f"--json is --format json, and --format is {args.format}: give one of them")
    ending = "" if out is None else out.suffix.lower().lstrip(".")
    is_file = out is not None and not out.is_dir() and ending in FORMATS and not args.out.endswith(os.sep)
    if (
        out is not None
        and ending
        and args.format is None
        and not (is_file or out.is_dir() or args.out.endswith(os.sep))
    ):
        endings = ", ".join(f".{one}" for one in FORMATS)
        raise DataError(f"--out {args.out} ends in .{ending} (allowed: {endings}, or a folder, with a / at its end)")
    format = args.format or ("json" if args.json else ending if is_file else "txt")
    if is_file and ending != format:
        raise DataError(f"--out {args.out} ends in .{ending}, and --format is {format}: give one of them")
    timestamps = args.timestamps or ("none" if format == "txt" else "segment")
    if format in TIMED and timestamps == "none":
        raise DataError(f"--timestamps none: {format} is nothing without times (allowed: segment, word)")
    plan = _Plan(format, timestamps, file=out if is_file else None, folder=None if is_file else out)
    if plan.file is not None:
        if not plan.file.parent.is_dir():
            raise RunError(f"no folder {plan.file.parent} to write {plan.file.name} to")
        if plan.file.exists() and not args.overwrite:
            raise RunError(f"{plan.file} is there already: give another --out, or --overwrite")
    if plan.folder is not None and plan.folder.exists() and not plan.folder.is_dir():
        endings = ", ".join(f".{one}" for one in FORMATS)
        raise RunError(f"--out {plan.folder} is a file that ends in none of {endings}: give another, or a folder")
    return plan


def _found(path: Path, plan: _Plan) -> Iterator[_Item]:
    """The files that a word of the command line names."""
    from ft_speech.plugin import STT

    if not path.is_dir():
        yield _Item(path, Path(path.name))
        return
    inside = sorted(
        one
        for one in path.rglob("*")
        if one.suffix.lower() in STT.extensions
        and one.is_file()
        and not any(part.startswith(".") for part in one.relative_to(path).parts)
    )
    if not inside:
        _fault(plan, f"{path}: holds no audio (files that end in {', '.join(STT.extensions)})")
    yield from (_Item(one, one.relative_to(path)) for one in inside)


def _place(plan: _Plan, overwrite: bool) -> None:
    """Say of each file where its transcript goes.

    Raises:
        DataError: two would be the same file, or several are to be one that holds only one.
    """
    if plan.format in TIMED and plan.folder is None and len(plan.items) > 1:
        raise DataError(f"{len(plan.items)} files: a .{plan.format} holds one, so give --out a folder for a file each")
    sources = {item.path.resolve() for item in plan.items}
    if plan.file is not None and plan.file.resolve() in sources:
        raise DataError(f"--out {plan.file} is a recording to be written down: give another")
    if plan.folder is None:
        return
    taken: dict[Path, Path] = {}
    for item in plan.items:
        item.out = plan.folder / item.relative.with_suffix(f".{plan.format}")
        if item.out in taken:
            raise DataError(
                f"{taken[item.out]} and {item.path} would both be written to {item.out}: give them in two commands, "
                "with two folders"
            )
        taken[item.out] = item.path


# -- the work ------------------------------------------------------------------------------------------------------


def _transcribe(args: argparse.Namespace, plan: _Plan, items: Sequence[_Item]) -> None:
    """Hear files, some at a time, and write each as soon as it is heard."""
    from ft_core.console import say
    from ft_speech.listening.progress import Shown, seconds_of
    from ft_speech.listening.recogniser import open_recogniser

    for item in items:
        item.seconds = seconds_of(item.path)
    recogniser = open_recogniser(args.run, say=say)
    options = {
        "language": args.language, "task": args.task, "timestamps": plan.timestamps, "batch_size": args.batch_size
    }  # fmt: skip
    if args.prompt:
        options["prompt"] = args.prompt
    if args.max_new_tokens:
        options["max_new_tokens"] = args.max_new_tokens
    if args.long_form != "pauses":
        options["long_form"] = args.long_form
    recogniser.check(**options)
    shown = Shown(len(items), sum(item.seconds for item in items))
    done: list[_Item] = []
    several = len(plan.items) > 1
    try:
        for group, samples in _groups(items, recogniser, args.batch_size, plan, shown):
            found = recogniser.transcribe(samples, progress=shown.heard, **options)
            for item, transcript in zip(group, found, strict=True):
                item.transcript = transcript
                if plan.file is None:
                    shown.clear()
                    _write(plan, item, args.task, several)
                if transcript.cut:
                    shown.clear()
                    say(
                        f"{item.path}: {transcript.cut} of its windows have text that was cut off after "
                        f"{args.max_new_tokens or 'as many tokens as the model can write'}"
                        f"{' tokens (--max-new-tokens)' if args.max_new_tokens else ''}"
                    )
                done.append(item)
            shown.files(len(group))
    finally:
        shown.end()
        # An interruption, or memory that ran out, does not lose what was heard before.
        if done:
            _finish(plan, done, args.task, several, len(items))


def _groups(
    items: Sequence[_Item], recogniser: Recogniser, batch_size: int, plan: _Plan, shown: Shown
) -> Iterator[tuple[list[_Item], list[npt.NDArray[np.float32]]]]:
    """Files that are heard together, with their samples; what cannot be read is said and left out."""
    from ft_speech.audio import read_audio

    group: list[_Item] = []
    samples: list[npt.NDArray[np.float32]] = []
    windows = 0
    longest = getattr(recogniser, "longest", None) or 30.0
    for item in items:
        try:
            one, rate = read_audio(item.path, sampling_rate=recogniser.sampling_rate)
        except FtError as error:
            shown.clear()
            _fault(plan, error)
            shown.lost(item.seconds)
            continue
        shown.corrected(len(one) / rate - item.seconds)
        item.seconds = len(one) / rate
        group.append(item)
        samples.append(one)
        windows += 1 + int(item.seconds / longest)
        if windows >= TOGETHER * batch_size:
            yield group, samples
            group, samples, windows = [], [], 0
    if group:
        yield group, samples


# -- what is written -----------------------------------------------------------------------------------------------


def _lines(plan: _Plan, item: _Item, task: str, *, named: bool = False) -> str:
    """A transcript in its format; ``named``: among others, which it must be told from."""
    assert item.transcript is not None
    if plan.format == "srt":
        return srt(item.transcript)
    if plan.format == "vtt":
        return vtt(item.transcript)
    if plan.format == "txt":
        lines = text(item.transcript, timed=plan.timestamps != "none")
        if not named:
            return lines
        return f"{item.path}\n{lines}\n" if plan.timestamps != "none" else f"{item.path}: {lines}"
    return document(plan.format, [_row(item, task)])


def _row(item: _Item, task: str) -> dict[str, Any]:
    assert item.transcript is not None
    return as_row(os.path.abspath(item.path), item.seconds, task, item.transcript)


def _write(plan: _Plan, item: _Item, task: str, several: bool) -> None:
    """Write a transcript to its file, or print it; a list of JSON waits for its last."""
    from ft_core.runs import write_text

    if item.out is not None:
        try:
            item.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {item.out.parent}: {error.strerror or error}") from error
        write_text(item.out, _lines(plan, item, task))
    elif not (plan.format == "json" and several):
        print(_lines(plan, item, task, named=several), end="", flush=True)


def _finish(plan: _Plan, done: Sequence[_Item], task: str, several: bool, of: int) -> None:
    """Write or print what holds all transcripts that were made."""
    from ft_core.console import counted
    from ft_core.runs import write_text

    if plan.folder is not None or (plan.file is None and not (plan.format == "json" and several)):
        return
    if plan.format in ("json", "jsonl"):
        rows = [_row(item, task) for item in done]
        whole = document(plan.format, rows)
        if plan.format == "json" and several and len(rows) == 1:
            whole = f"[{whole.rstrip()}]\n"  # a list, however many could be used
    else:
        whole = "".join(_lines(plan, item, task, named=several) for item in done)
    if plan.file is None:
        print(whole, end="")
        return
    write_text(plan.file, whole)
    print(f"{counted(len(done), 'transcript')}{f' of {of}' if len(done) < of else ''} in {plan.file}")
