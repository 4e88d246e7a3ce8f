"""``ft speak TEXT --model RUN --out a.wav``: a text spoken into a file, or as it is made."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.commands.arguments import share, temperature
from ft_core.errors import DataError, RunError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ft_speech.speaking.speaker import Speaker

__all__ = ["add_arguments", "more_help", "run"]

PAUSE = 0.25
"""Seconds of silence between two lines of a text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what is spoken; - reads it from stdin")
    parser.add_argument("--file", metavar="FILE", help="a text file to speak, line after line")
    parser.add_argument(
        "--model", metavar="RUN", required=True, help="a run folder, or a model: a folder or a Hub name"
    )
    parser.add_argument("--out", metavar="FILE", required=True, help=".wav, .flac, .ogg or .mp3; - is stdout")
    parser.add_argument("--voice", help="whose voice, of those that the model was trained on")
    parser.add_argument("--style", help="how it is said, of the styles that the model was trained on")
    parser.add_argument("--temperature", type=temperature, default=0.6, help="0 takes the likeliest code (0.6)")
    parser.add_argument("--top-p", type=share, default=0.9, help="nucleus sampling's share (0.9)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one speaks it another way (0)")
    parser.add_argument(
        "--max-seconds", type=_seconds, default=30.0, metavar="S", help="the longest speech of a line (30)"
    )
    parser.add_argument("--codec", help="of a model that does not say it: a name of ft plugins")
    parser.add_argument("--codec-model", metavar="MODEL", help="the folder or the Hub name of the codec's weights")
    parser.add_argument(
        "--stream", action="store_true", help="let the file grow as it is spoken, instead of appearing when it is whole"
    )
    parser.add_argument("--raw", action="store_true", help="to stdout: 16-bit samples without a wav's header")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there")


def more_help() -> str:
    return (
        "Each line of a text is spoken for itself, a short pause between two. "
        "To hear it as it is made: ft speak … --out - | aplay"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed (allowed: a number above 0 and up to 600)")
    return value


def run(args: argparse.Namespace) -> int:
    from ft_core.models.opening import check_reference

    _check(args)
    lines = _lines(args)
    check_reference(args.model)
    from ft_core.console import quiet, say

    quiet()
    from ft_speech.speaking.speaker import open_speaker

    speaker = open_speaker(args.model, codec=args.codec, codec_model=args.codec_model, say=say)
    from ft_speech.speaking.writing import sink

    began = time.monotonic()
    with ExitStack() as stack:
        write = stack.enter_context(sink(args.out, speaker.sample_rate, grows=args.stream, raw=args.raw))
        samples = _spoken(args, speaker, lines, write, say)
        if not samples:
            raise RunError("the model ended its speech before it began: nothing is written (try another --seed)")
    took, seconds = time.monotonic() - began, samples / speaker.sample_rate
    done = f"{seconds:.1f} s of speech in {took:.1f} s, {_speed(seconds, took)}"
    if args.out == "-":
        say(done)
    else:
        print(f"{args.out}: {done}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is loaded."""
    from ft_speech.audio import FORMATS

    if (args.text is None) == (args.file is None):
        raise DataError("give a TEXT, or a file of it with --file" + ("" if args.text is None else ", not both"))
    if not 0 <= args.seed < 2**63:
        raise DataError(f"--seed {args.seed} is not allowed (allowed: a whole number from 0)")
    if args.out == "-":
        if args.overwrite:
            raise DataError("--overwrite is of a file, and --out - is stdout")
        return
    if args.raw:
        raise DataError("--raw is of stdout: give --out -")
    out = Path(args.out)
    ending = out.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise DataError(f"--out {out}: the ending says the format, one of {', '.join('.' + one for one in FORMATS)}")
    if args.stream and ending != "wav":
        raise DataError(f"--stream: a file that grows is a .wav, not a .{ending}")
    if not out.parent.is_dir():
        raise RunError(f"no folder {out.parent} to write {out.name} to")
    if out.is_dir():
        raise RunError(f"--out {out} is a folder: give a file")
    if out.exists() and not args.overwrite:
        raise RunError(f"{out} is there already: give another --out, or --overwrite")


def _lines(args: argparse.Namespace) -> list[str]:
    if args.file is not None:
        try:
            text = Path(args.file).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"no text file {args.file}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the text {args.file}: {error}") from error
    else:
        text = sys.stdin.read() if args.text == "-" else args.text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError("the text is empty, so there is nothing to be spoken")
    return lines


def _spoken(
    args: argparse.Namespace,
    speaker: Speaker,
    lines: list[str],
    write: Callable[[Any], None],
    say: Callable[[str], None],
) -> int:
    """Speak all lines; returns how many samples were written."""
    import numpy as np

    samples, show = 0, _Shown()
    for number, line in enumerate(lines):
        before = samples
        for piece in _pieces(args, speaker, line):
            if number and samples == before:
                pause: npt.NDArray[np.float32] = np.zeros(round(PAUSE * speaker.sample_rate), np.float32)
                write(pause)
                samples += len(pause)
            write(piece)
            samples += len(piece)
            show(samples / speaker.sample_rate)
        if speaker.cut:
            show.end()
            say(f"cut: {line[:40]!r} was not ended within {args.max_seconds:g} s (--max-seconds) or the model's length")
    show.end()
    return samples


def _pieces(args: argparse.Namespace, speaker: Speaker, line: str) -> Iterator[npt.NDArray[np.float32]]:
    return speaker.speak(
        line,
        voice=args.voice,
        style=args.style,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        max_seconds=args.max_seconds,
    )


class _Shown:
    """Seconds spoken and how quickly, on a terminal's stderr."""

    def __init__(self) -> None:
        self._live, self._began, self._last, self._open = sys.stderr.isatty(), time.monotonic(), 0.0, False

    def __call__(self, seconds: float) -> None:
        now = time.monotonic()
        if self._live and now - self._last >= 0.2:
            self._last, self._open = now, True
            sys.stderr.write(f"\r\x1b[K{seconds:.1f} s spoken, {_speed(seconds, now - self._began)}")
            sys.stderr.flush()

    def end(self) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._open = False


def _speed(seconds: float, took: float) -> str:
    """The real-time factor in words."""
    return f"{seconds / max(took, 1e-6):.2f} times as fast as it sounds"
