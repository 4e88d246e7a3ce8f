"""``ft generate RUN --prompts FILE --out FILE``: batched, and going on where an earlier call stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_core.commands.arguments import count, share, temperature
from ft_core.errors import DataError, RunError
from ft_core.runs import write_text

__all__ = ["add_arguments", "read_prompts", "run"]

CHUNK = 64
"""Answers are written after each so many prompts, so that little is lost when the work is interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or a model as in a configuration")
    parser.add_argument("--prompts", required=True, metavar="FILE", help=".txt (a prompt a line), .jsonl or .json")
    parser.add_argument("--out", required=True, metavar="FILE", help=".jsonl to write; what is there already is kept")
    parser.add_argument("--system", help="a system message for every prompt that has none")
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, help="0 (the default) takes the likeliest token"
    )
    parser.add_argument("--top-p", type=share, default=1.0)
    parser.add_argument("--overwrite", action="store_true", help="begin the output anew")


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a text file (one a line), or of a .jsonl file or a list in a .json file.

    In the latter two a prompt is ``{"prompt"}``, ``{"messages"}`` or a string.

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


def _prompt(row: Any, where: str) -> Any:
    prompt = row.get("prompt", row.get("messages")) if isinstance(row, dict) else row
    if not isinstance(prompt, str | list) or not prompt:
        raise DataError(f"{where}: has neither 'prompt' nor 'messages'")
    if isinstance(prompt, str):
        return prompt
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in prompt):
        raise DataError(f"{where}: a message is {{'role': …, 'content': text}}")
    # A conversation that ends with an answer is asked again for that answer.
    return prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt


def _done(out: Path, prompts: list[Any]) -> int:
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
        if not isinstance(row, dict) or set(row) != {"prompt", "answer"}:
            raise RunError(f"{foreign} (line {len(whole) + 1}): {advice}")
        if len(whole) >= len(prompts) or row["prompt"] != prompts[len(whole)]:
            raise RunError(f"{out} holds answers to other prompts (line {len(whole) + 1}): {advice}")
        whole.append(line + b"\n")
    if not last.startswith(b'{"prompt": '[: len(last)]):
        raise RunError(f"{foreign} (line {len(whole) + 1}): {advice}")
    if last:
        write_text(out, b"".join(whole).decode())
    return len(whole)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(Path(args.prompts))
    out = Path(args.out)
    if not out.parent.is_dir():
        raise RunError(f"no folder {out.parent} to write {out.name} to")
    if out.is_dir():
        raise RunError(f"--out {out} is a folder: give a .jsonl file")
    if out.exists() and out.samefile(args.prompts):
        raise RunError(f"--out {out} is the file of the prompts: give another")
    done = 0 if args.overwrite else _done(out, prompts)
    from ft_core.console import counted, progress, quiet, say
    from ft_core.models.opening import check_reference, open_model

    if done >= len(prompts):
        say(f"{out} is complete: {counted(done, 'answer')}")
        return 0
    check_reference(args.run)
    quiet()
    from ft_core.generation import encode_prompts, generate_ids

    model, tokenizer = open_model(args.run, say=say)
    if done:
        say(f"{done} of {len(prompts)} are there already")
    # Whatever is wrong with a prompt is said before the first is answered.
    ids = encode_prompts(model, tokenizer, prompts, system=args.system)
    show = progress("answers")
    mode = "w" if args.overwrite else "a"
    try:
        with open(out, mode, encoding="utf-8") as file:
            for start in range(done, len(prompts), CHUNK):
                batch = prompts[start : start + CHUNK]
                answers = generate_ids(
                    model,
                    tokenizer,
                    ids[start : start + CHUNK],
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                )
                for prompt, answer in zip(batch, answers, strict=True):
                    file.write(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
                file.flush()
                show(start + len(batch) - done, len(prompts) - done)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; the answers written so far are kept") from error
    print(f"{counted(len(prompts), 'answer')} in {out}")
    return 0
