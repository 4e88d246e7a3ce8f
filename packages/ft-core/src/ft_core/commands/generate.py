"""``ft generate RUN --prompts FILE --out FILE``: batched, and going on where an earlier call stopped."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ft_core.errors import DataError, RunError

__all__ = ["add_arguments", "read_prompts", "run"]

CHUNK = 64
"""Answers are written after each so many prompts, so that little is lost when the work is interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or a model as in a configuration")
    parser.add_argument("--prompts", required=True, metavar="FILE", help=".txt (a prompt a line) or .jsonl")
    parser.add_argument("--out", required=True, metavar="FILE", help=".jsonl to write; what is there already is kept")
    parser.add_argument("--system", help="a system message for every prompt that has none")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--overwrite", action="store_true", help="begin the output anew")


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a text file (one a line) or of JSON lines (``{"prompt"}``, ``{"messages"}``, or a string).

    Raises:
        DataError: no such file, nothing in it, or a line that is no prompt; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"no prompts file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts {path}: {error}") from error
    prompts: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no valid JSON ({error})") from None
        prompt = (
            row if isinstance(row, str) else row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
        )
        if not isinstance(prompt, str | list) or not prompt:
            raise DataError(f"{path}, line {number}: has neither 'prompt' nor 'messages'")
        if isinstance(prompt, list):
            if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in prompt):
                raise DataError(f"{path}, line {number}: a message is {{'role': …, 'content': text}}")
            # A conversation that ends with an answer is asked again for that answer.
            prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _done(out: Path, prompts: list[Any]) -> int:
    """How many answers are there already; a last line that was cut short is removed.

    Raises:
        RunError: the answers that are there belong to other prompts.
    """
    if not out.is_file():
        return 0
    whole = []
    for line in out.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n"):
            break
        index = len(whole)
        if not isinstance(row, dict) or index >= len(prompts) or row.get("prompt") != prompts[index]:
            raise RunError(
                f"{out} holds answers to other prompts (line {index + 1}): give another --out, or --overwrite"
            )
        whole.append(line)
    beside = out.with_name(f".{out.name}.partial")
    beside.write_text("".join(whole), encoding="utf-8")
    os.replace(beside, out)
    return len(whole)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(Path(args.prompts))
    out = Path(args.out)
    if not out.parent.is_dir():
        raise RunError(f"no folder {out.parent} to write {out.name} to")
    done = 0 if args.overwrite else _done(out, prompts)
    from ft_core.console import progress, quiet, say

    if done >= len(prompts):
        say(f"{out} is complete: {done} answers")
        return 0
    quiet()
    from ft_core.generation import generate
    from ft_core.models.opening import open_model

    model, tokenizer = open_model(args.run, say=say)
    if done:
        say(f"{done} of {len(prompts)} are there already")
    show = progress("answers")
    mode = "w" if args.overwrite else "a"
    try:
        with open(out, mode, encoding="utf-8") as file:
            for start in range(done, len(prompts), CHUNK):
                batch = prompts[start : start + CHUNK]
                answers = generate(
                    model,
                    tokenizer,
                    batch,
                    system=args.system,
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
    print(f"{len(prompts)} answers in {out}")
    return 0
