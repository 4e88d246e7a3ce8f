"""``ft generate RUN PROMPT``: an answer; ``ft generate RUN --prompts FILE --out FILE``: batched, and going on where an
earlier call stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_core.answering import Question, answerer_of, turn
from ft_core.commands.arguments import count, share, temperature
from ft_core.errors import DataError, RunError
from ft_core.runs import write_text

__all__ = ["add_arguments", "read_prompts", "run"]

CHUNK = 64
"""Answers are written after each so many prompts, so that little is lost when the work is interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or a model as in a configuration")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what is asked; the answer is printed")
    parser.add_argument("--image", action="append", metavar="FILE", help="an image to ask about; may be given again")
    parser.add_argument("--prompts", metavar="FILE", help=".txt (a prompt a line), .jsonl or .json")
    parser.add_argument("--out", metavar="FILE", help=".jsonl to write; what is there already is kept")
    parser.add_argument("--system", help="a system message for every prompt that has none")
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0 (the default) takes the likeliest token"
    )
    parser.add_argument("--top-p", type=share, default=1.0)
    parser.add_argument("--overwrite", action="store_true", help="begin the output anew")


def read_prompts(path: Path) -> list[Question]:
    """Prompts of a text file (one a line), or of a .jsonl file or a list in a .json file.

    In the latter two a prompt is ``{"prompt"}``, ``{"messages"}``, ``{"conversations"}`` or a string; its images may
    stand in the messages, or beside them as ``images`` or ``image``.

    Raises:
        DataError: no such file, another ending, nothing in it, or a line that is no prompt; names the line.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl", ".json", ""):
        raise DataError(f"{path}: prompts are read from .txt (one a line), .jsonl and .json files, not {kind}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no prompts file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts {path}: {error}") from error
    prompts = [_prompt(row, where) for where, row in _rows(text, kind, path)]
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _rows(text: str, kind: str, path: Path) -> Iterator[tuple[str, Any]]:
    if kind == ".json":
        rows = _parsed(text, str(path)) if text.strip() else []
        if not isinstance(rows, list):
            raise DataError(f"{path}: a .json file of prompts holds a list; one object a line is .jsonl")
        yield from ((f"{path}, prompt {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other separators of lines
        where = f"{path}, line {number}"
        if line.strip():
            yield where, _parsed(line, where) if kind == ".jsonl" else line


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({error})") from None


def _prompt(row: Any, where: str) -> Question:
    prompt, images = row, None
    if isinstance(row, dict):
        prompt = next((row[name] for name in ("prompt", "messages", "conversations") if name in row), None)
        images = row.get("images") if row.get("image") is None else [row["image"]]
        if images is not None and not isinstance(images, list):
            raise DataError(f"{where}: images must be a list")
    if not isinstance(prompt, str | list) or not prompt:
        raise DataError(f"{where}: has neither 'prompt' nor 'messages'")
    if isinstance(prompt, list) and isinstance(prompt[-1], dict):
        # A conversation that ends with an answer is asked again for that answer.
        answered = prompt[-1].get("role", prompt[-1].get("from")) in ("assistant", "gpt")
        prompt = prompt[:-1] if answered else prompt
    return Question(prompt, tuple(images) if images else None, where)


def _done(out: Path, questions: list[Question]) -> int:
    """How many answers are there already; a last line that was cut short is removed.

    Raises:
        RunError: what is there are answers to other prompts, or no answers at all.
    """
    if not out.is_file():
        return 0
    foreign = f"{out} holds something else than answers"
    advice = "give another --out, or --overwrite"
    whole: list[bytes] = []
    try:
        *lines, last = out.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot read {out}: {error.strerror}") from error
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or {*row, "images"} != {"prompt", "images", "answer"}:
            raise RunError(f"{foreign} (line {len(whole) + 1}): {advice}")
        del row["answer"]
        if len(whole) >= len(questions) or row != questions[len(whole)].as_row():
            raise RunError(f"{out} holds answers to other prompts (line {len(whole) + 1}): {advice}")
        whole.append(line + b"\n")
    if not last.startswith(b'{"prompt": '[: len(last)]):
        raise RunError(f"{foreign} (line {len(whole) + 1}): {advice}")
    if last:
        write_text(out, b"".join(whole).decode())
    return len(whole)


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.out is None:
        return _print(args)
    if args.prompts is None:
        questions = [Question(args.prompt, tuple(args.image) if args.image else None)]
        folder = Path.cwd()
    else:
        questions = read_prompts(Path(args.prompts))
        folder = Path(args.prompts).absolute().parent
    out = Path(args.out)
    if not out.parent.is_dir():
        raise RunError(f"no folder {out.parent} to write {out.name} to")
    if out.is_dir():
        raise RunError(f"--out {out} is a folder: give a .jsonl file")
    if args.prompts is not None and out.exists() and out.samefile(args.prompts):
        raise RunError(f"--out {out} is the file of the prompts: give another")
    done = 0 if args.overwrite else _done(out, questions)
    from ft_core.console import counted, progress, quiet, say
    from ft_core.models.opening import check_reference

    if done >= len(questions):
        say(f"{out} is complete: {counted(done, 'answer')}")
        return 0
    check_reference(args.run)
    quiet()
    answerer = answerer_of(args.run, images=bool(args.image))
    # Whatever is wrong with a prompt is said before the first is answered.
    checked = answerer.check(questions, folder)
    answerer.open(say)
    if done:
        say(f"{done} of {len(questions)} are there already")
    encoded = answerer.encode(checked, args.system)
    show = progress("answers")
    mode = "w" if args.overwrite else "a"
    try:
        with open(out, mode, encoding="utf-8") as file:
            for start in range(done, len(questions), CHUNK):
                batch = questions[start : start + CHUNK]
                answers = answerer.answers(encoded[start : start + CHUNK], **_settings(args))
                for question, answer in zip(batch, answers, strict=True):
                    file.write(json.dumps({**question.as_row(), "answer": answer}, ensure_ascii=False) + "\n")
                file.flush()
                show(start + len(batch) - done, len(questions) - done)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; the answers written so far are kept") from error
    print(f"{counted(len(questions), 'answer')} in {out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if (args.prompt is None) == (args.prompts is None):
        raise DataError(
            "give a PROMPT, or a file of them with --prompts" + ("" if args.prompt is None else ", not both")
        )
    if args.prompt is not None and not args.prompt.strip():
        raise DataError("PROMPT is empty: say what is asked")
    if args.prompts is not None and args.out is None:
        raise DataError("--prompts needs --out, a .jsonl file for the answers")
    if args.prompts is not None and args.image:
        raise DataError("--image goes with a PROMPT: in a file of prompts each row names its own images")
    if args.out is None and args.overwrite:
        raise DataError("--overwrite is of --out, which is not given: the answer is printed")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}


def _print(args: argparse.Namespace) -> int:
    """The answer to one prompt, as it is written."""
    from ft_core.console import quiet, say
    from ft_core.models.opening import check_reference

    check_reference(args.run)
    quiet()
    answerer = answerer_of(args.run, images=bool(args.image))
    answerer.check([Question(args.prompt, tuple(args.image) if args.image else None)], Path.cwd())
    answerer.open(say)
    history = [turn(args.prompt, args.image or ())]
    if args.system:
        history.insert(0, {"role": "system", "content": args.system})
    answer = answerer.stream(history, Path.cwd(), **_settings(args))
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    finally:
        answer.close()
    print()
    return 0
