"""Prompts to measure on: the run's held-out rows in the model's chat template, else a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError

__all__ = ["SENTENCES", "Row", "prompt_text", "read_rows", "token_ids"]

Row = dict[str, Any]

SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "To bake bread you need flour, water, salt and yeast; the rest is time.",
    "In 1969 two people walked on the Moon while a third stayed in orbit.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))",
    "Die Sonne geht im Osten auf und im Westen unter.",
    "If x + 3 = 10, then x equals 7, because 10 - 3 = 7.",
)


def read_rows(held_out: Path | None, count: int = 8) -> list[Row]:
    """Up to ``count`` rows of a file of held-out rows (normal form, docs/run-folder.md), else built-in sentences.

    Raises:
        ExportError: a line of the file is not JSON.
    """
    rows: list[Row] = []
    if held_out is not None:
        with held_out.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(rows) == count:
                    break
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ExportError(f"{held_out}, line {number} is not JSON: {error}") from error
                    if not isinstance(row, dict):
                        raise ExportError(f"{held_out}, line {number} holds no JSON object")
                    rows.append(row)
    return rows or [{"text": sentence} for sentence in SENTENCES[:count]]


def token_ids(row: Row, tokenizer: Any, longest: int = 128) -> list[int]:
    """The token ids of a whole row, prompt and answer, cut at ``longest``."""
    return _encode(tokenizer, *_render(row, tokenizer, answer=True))[:longest]


def prompt_text(row: Row, tokenizer: Any) -> tuple[str, bool]:
    """What the model is asked in this row, as one string, and whether it holds its special tokens itself.

    Without a chat template or a question (plain text) it is the first half of the text's words.
    """
    return _render(row, tokenizer, answer=False)


def _render(row: Row, tokenizer: Any, answer: bool) -> tuple[str, bool]:
    messages = _messages(row, answer)
    if messages is not None and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answer)
        return text, True
    if messages is not None:
        return "\n".join(str(message["content"]) for message in messages), False
    if "text" in row:
        words = str(row["text"]).split(" ")
        return (str(row["text"]) if answer else " ".join(words[: max(1, len(words) // 2)])), False
    return str(row.get("prompt", "")) + (str(row.get("completion", "")) if answer else ""), False


def _messages(row: Row, answer: bool) -> list[dict[str, Any]] | None:
    messages: list[dict[str, Any]] | None = None
    if "messages" in row:
        messages = list(row["messages"])
        if not answer:
            while len(messages) > 1 and messages[-1]["role"] == "assistant":
                messages.pop()
    elif isinstance(row.get("prompt"), list):
        said = row.get("chosen") or row.get("completion") or []
        messages = [*row["prompt"], *(said if answer and isinstance(said, list) else [])]
    elif isinstance(row.get("chosen"), list):
        messages = list(row["chosen"] if answer else row["chosen"][:-1])
    return messages


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=not special)["input_ids"]
    return ids
