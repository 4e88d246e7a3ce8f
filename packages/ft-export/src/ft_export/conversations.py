"""How a model wants to be served, whatever serves it: its context, its sampling, its system prompt, its stops."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import stop_tokens
from ft_export.errors import ExportError
from ft_export.runs import Source, read_json
from ft_export.samples import Row, read_rows

__all__ = ["SAMPLING", "Serving", "all_rows", "conversation", "serving", "whole_number"]

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What is taken from a model's generation configuration, by transformers' names."""
LEAST_CONTEXT = 4096
ROLES = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True)
class Serving:
    """What servers are told about a model.

    Attributes:
        context: tokens that a prompt and its answer may have.
        context_from: what ``context`` follows from, for people.
        sampling: those of ``SAMPLING`` that the model's files name.
        system: the system prompt that all held-out rows begin with, or None.
        stops: the texts of the tokens that end an answer, with their ids.
        questions: first questions of the held-out rows, each once.
    """

    context: int
    context_from: str
    sampling: dict[str, float]
    system: str | None
    stops: dict[str, int]
    questions: tuple[str, ...]


def serving(source: Source, model: Path, tokenizer: Any, context: int | None = None) -> Serving:
    """Read it from a run's files and those of its whole model.

    Without ``context`` it is the length that the run was trained with, no less than 4096 tokens, and no more than the
    model has positions: a model that was trained on short texts still needs room for a conversation.

    Raises:
        ExportError: ``context`` is more than the model has positions, or a file is broken.
    """
    positions = _positions(model)
    trained = _trained_length(source)
    if context is not None:
        if positions is not None and context > positions:
            raise ExportError(f"num_ctx={context} is more than the model has positions ({positions})")
        found, why = context, "asked for"
    else:
        wanted = max(trained or 0, LEAST_CONTEXT)
        found = min(wanted, positions) if positions is not None else wanted
        if found == positions and found < wanted:
            why = "all positions of the model"
        else:
            why = "the run's max_length" if found == trained else f"at least {LEAST_CONTEXT}"
    rows = all_rows(source)
    return Serving(found, why, _sampling(model), _system(rows), _stops(tokenizer, model), _questions(rows))


def all_rows(source: Source) -> list[Row]:
    """All held-out rows of a run; none where there is no run or nothing was held out.

    Raises:
        ExportError: a line is not a JSON object.
    """
    if source.held_out is None:
        return []
    rows = read_rows(source.held_out, count=sys.maxsize)
    return [row for row in rows if "text" not in row]  # an empty file gives the built-in sentences


def conversation(row: Row) -> list[dict[str, str]] | None:
    """The messages of a row up to where the assistant is to speak; None where they are not all plain text."""
    said = row.get("messages", row.get("prompt"))
    if not isinstance(said, list):
        said = [*row["chosen"]] if isinstance(row.get("chosen"), list) else None
    if said is None:
        return None
    messages = [message for message in said if isinstance(message, dict)]
    if len(messages) < len(said):
        return None
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    plain = all(
        m.get("role") in ROLES and isinstance(m.get("content"), str) and not m.get("tool_calls") for m in messages
    )
    return [{"role": m["role"], "content": m["content"]} for m in messages] if messages and plain else None


def whole_number(options: dict[str, str], name: str) -> int | None:
    """An option that is a whole number above 0, or None where it is not given.

    Raises:
        ExportError: it is something else.
    """
    if name not in options:
        return None
    said = options[name]
    if not (said.isascii() and said.isdigit() and int(said) > 0):
        raise ExportError(f"{name}={said} is no whole number above 0")
    return int(said)


def _positions(model: Path) -> int | None:
    config = read_json(model / "config.json")
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None


def _trained_length(source: Source) -> int | None:
    if not source.is_run or not (source.path / "config.yaml").is_file():
        return None
    import yaml

    config = yaml.safe_load((source.path / "config.yaml").read_text(encoding="utf-8"))  # open_source has read it before
    found = config.get("max_length") if isinstance(config, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def _sampling(model: Path) -> dict[str, float]:
    """What the generation configuration names, where it samples at all."""
    path = model / "generation_config.json"
    said = read_json(path) if path.is_file() else {}
    if said.get("do_sample") is False:
        return {}
    numbers = {name: said[name] for name in SAMPLING if isinstance(said.get(name), int | float)}
    return {name: value for name, value in numbers.items() if not isinstance(value, bool)}


def _system(rows: list[Row]) -> str | None:
    found = set()
    for row in rows:
        messages = conversation(row)
        if messages is not None:
            first = messages[0]
            found.add(first["content"] if first["role"] == "system" else None)
    return found.pop() if len(found) == 1 else None


def _stops(tokenizer: Any, model: Path) -> dict[str, int]:
    """Texts by which the engine sees the end of an answer.

    Raises:
        ExportError: the text of a stop token is not read back as that token.
    """
    stops = {}
    for token in stop_tokens(tokenizer, model):
        text = str(tokenizer.convert_ids_to_tokens(token))
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != [token]:
            raise ExportError(
                f"the stop token {json.dumps(text)} ({token}) is not read back as itself by the tokenizer"
            )
        stops[text] = token
    return stops


def _questions(rows: list[Row]) -> tuple[str, ...]:
    found = []
    for row in rows:
        asked = next((m["content"].strip() for m in conversation(row) or [] if m["role"] == "user"), "")
        if asked and asked not in found:
            found.append(asked)
    return tuple(found)
