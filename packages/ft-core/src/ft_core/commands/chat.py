"""``ft chat RUN``: a conversation on the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, current_thread, main_thread
from types import FrameType

from ft_core.answering import Answerer, Question, answerer_of, turn
from ft_core.commands.arguments import count, share, temperature
from ft_core.errors import DataError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or a model as in a configuration")
    parser.add_argument(
        "--image", action="append", metavar="FILE", help="an image that the first message is about; may be given again"
    )
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--max-new-tokens", type=count, default=1024, metavar="N")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0 (the default) takes the likeliest token"
    )
    parser.add_argument("--top-p", type=share, default=1.0)


def run(args: argparse.Namespace) -> int:
    from ft_core.console import quiet, say
    from ft_core.models.opening import check_reference

    check_reference(args.run)
    quiet()
    answerer = answerer_of(args.run, images=bool(args.image))
    images = [_image(answerer, path) for path in args.image or ()]
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no UTF-8 is a character not understood, no end
    answerer.open(say)
    if not answerer.tokenizer.chat_template and not answerer.images:  # a model that sees has its processor's
        if args.system:
            raise DataError("the model's tokenizer has no chat template, so it knows no system message: leave --system")
        say("this model has no chat template: each line is a new text that it goes on from, nothing is remembered")
    first = [{"role": "system", "content": args.system}] if args.system else []
    history = list(first)
    shows = " /image FILE shows an image with the next message." if answerer.images else ""
    say(f"Ctrl-C stops an answer, Ctrl-D (or Ctrl-C at the prompt) ends. /new starts over.{shows}")
    while True:
        try:
            asked = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not asked:
            continue
        if asked == "/new":
            history, images = list(first), []
            continue
        if asked == "/image" or asked.startswith("/image "):
            try:
                images.append(_image(answerer, asked.removeprefix("/image").strip().strip("'\"")))
            except DataError as error:
                if not sys.stdin.isatty():
                    raise
                say(str(error))
            continue
        history.append(turn(asked, images))
        pieces = []
        answer = answerer.stream(
            history,
            Path.cwd(),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            stopped=(stopped := Event()),
        )
        try:
            with _interrupting(stopped):
                for piece in answer:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
            if stopped.is_set():
                say(" (stopped)")
        except KeyboardInterrupt:
            say(" (stopped)")
        except DataError as error:
            if not sys.stdin.isatty():
                raise
            say(f"{error} (/new starts over)")
            history.pop()
            continue
        finally:
            answer.close()
        print()
        images = []
        history.append({"role": "assistant", "content": "".join(pieces)})


def _image(answerer: Answerer, path: str) -> str:
    """The path of an image that can be shown.

    Raises:
        DataError: it cannot be, or the model sees none.
    """
    if not answerer.images:
        raise DataError("/image: this model sees no images")
    if not path:
        raise DataError("/image: give the file of an image")
    answerer.check([Question("an image", (path,))], Path.cwd())
    return path


@contextmanager
def _interrupting(stopped: Event) -> Iterator[None]:
    """Let Ctrl-C set the event: an exception in the midst of whatever runs could be lost. A second one raises."""

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    if current_thread() is not main_thread():  # Python hands signals to the main thread only
        yield
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
