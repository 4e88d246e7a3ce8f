"""The data formats that are recognised by their columns, and the normal form that each row is brought to.

The normal forms are those of the run folder's page: ``{"messages"}``, ``{"prompt", "completion"}`` (strings),
``{"text"}``, ``{"prompt", "chosen", "rejected"}``, ``{"prompt", "completion", "label"}`` and ``{"prompt"}`` with all
other columns of the row (the last three: strings, or lists of messages). Three optional keys ride along:

* ``tools`` beside ``messages``: the functions offered to the model, passed to the chat template;
* ``weight`` on an assistant message, as in OpenAI's format: 0 keeps the turn out of the loss. The assistant turns of a
  ``prompt`` given as messages get it, so that only the completion is trained, as in TRL;
* ``alpaca`` beside ``messages``: instruction and input of an Alpaca row, for a tokenizer without a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ft_core.errors import DataError, FormError

__all__ = ["FORMATS", "ROLES", "Format", "recognise"]

Row = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles of a message. Which of them a model knows is its chat template's matter."""

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Format:
    """A data format.

    Attributes:
        name: the name that configurations use.
        columns: the columns that a row needs.
        optional: further columns that are read where they are there; all others are ignored, save by the prompt
            format, which keeps them.
        normalise: from a row to its normal form. Raises DataError, which says what is wrong but not where: the reader
            puts the file and line before it.
    """

    name: str
    columns: tuple[str, ...]
    normalise: Callable[[Row], dict[str, Any]]
    optional: tuple[str, ...] = ()


def recognise(columns: Iterable[str], among: Sequence[str] | None = None) -> str:
    """The name of the format that rows with these columns have.

    Where columns fit several formats (many Hub data sets carry ``prompt`` beside ``messages``), the first in the order
    of :data:`FORMATS` is meant, those in ``among`` before the others.

    Raises:
        FormError: no format's columns are all there. Shows the columns found and those that each format needs.
    """
    found = list(columns)
    fitting = [format for format in FORMATS.values() if set(format.columns) <= set(found)]
    if not fitting:
        names = list(FORMATS) if among is None else list(among)
        raise FormError(f"columns {_quoted(found)} fit no format; {needs(names)}")
    return next((format.name for format in fitting if among is None or format.name in among), fitting[0].name)


def needs(names: Iterable[str]) -> str:
    """What rows of the named formats need, in words."""
    return "needed are " + ", or ".join(f"{_quoted(FORMATS[name].columns)} ({name})" for name in names)


def check_columns(row: Row, format: Format) -> None:
    """Raise DataError if the row lacks a column that its format needs."""
    missing = [column for column in format.columns if column not in row]
    if missing:
        raise DataError(f"lacks {_quoted(missing)}, which the {format.name} format needs (found {_quoted(row)})")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _kind(value: Any) -> str:
    words = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be a string, not {_kind(value)}")
    return value


def _content(value: Any, name: str) -> str:
    """A message's content: a string, or OpenAI's list of text parts, which is joined."""
    if not isinstance(value, list):
        return _string(value, name)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            hint = " (task: vision trains on images)" if kind in ("image", "image_url") else ""
            raise DataError(f"{name} has a part of type {kind!r}: this method reads text parts only{hint}")
    return "".join(_string(part.get("text"), f"{name}'s text") for part in value)


def _message(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{name} must be an object with 'role' and 'content', not {_kind(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        found = f"has the unknown role {role!r}" if "role" in message else f"has no 'role' (found {_quoted(message)})"
        raise DataError(f"{name} {found}; allowed are {', '.join(ROLES)}")
    if "content" in message:
        message["content"] = _content(message["content"], f"{name}'s content")
    elif not message.get("tool_calls"):
        raise DataError(f"{name} has no 'content' (found {_quoted(message)})")
    if message.get("weight", 1) not in (0, 1):
        raise DataError(f"{name}'s weight must be 0 or 1, not {message['weight']!r}")
    return message


def _messages(value: Any, name: str, *, answer: bool = True) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise DataError(f"{name} must be a list of messages, not {_kind(value)}")
    if not value:
        raise DataError(f"{name} is empty")
    messages = [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if answer and all(message["role"] != "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{name} has no assistant turn (roles: {roles}), so there is nothing to learn")
    return messages


def _with_tools(row: Row, normal: dict[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"tools is not valid JSON: {error}") from error
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"tools must be a list of objects, not {_kind(tools)}")
        normal["tools"] = tools
    return normal


def _normalise_messages(row: Row) -> dict[str, Any]:
    normal = _with_tools(row, {"messages": _messages(row["messages"], "messages")})
    alpaca = row.get("alpaca")  # a row that is in the normal form already stays as it is
    if isinstance(alpaca, dict) and set(alpaca) == {"instruction", "input"}:
        normal["alpaca"] = {key: _string(text, key) for key, text in alpaca.items()}
    return normal


def _normalise_sharegpt(row: Row) -> dict[str, Any]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"conversations must be a list of turns, not {_kind(turns)}")
    messages = []
    for number, turn in enumerate(turns):
        name = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise DataError(f"{name} must be an object with 'from' and 'value', not {_kind(turn)}")
        if turn.get("role") is not None and turn.get("from") is None:  # ShareGPT's column, OpenAI's keys
            messages.append(turn)
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{name} has the unknown role {speaker!r}; allowed are {', '.join(_SHAREGPT_ROLES)}")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": _string(turn.get("value"), f"{name}'s value")})
    system = row.get("system")
    if system and messages and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": _string(system, "system")})
    return _with_tools(row, {"messages": _messages(messages, "conversations")})


def _normalise_alpaca(row: Row) -> dict[str, Any]:
    instruction, output = _string(row["instruction"], "instruction"), _string(row["output"], "output")
    given = _string(row["input"], "input") if row.get("input") is not None else ""
    return {
        "messages": [
            {"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction},
            {"role": "assistant", "content": output},
        ],
        "alpaca": {"instruction": instruction, "input": given},
    }


def _normalise_prompt_completion(row: Row) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return {"prompt": _string(prompt, "prompt"), "completion": _string(completion, "completion")}
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError(
            "prompt and completion must both be strings or both be lists of messages, "
            f"not {_kind(prompt)} and {_kind(completion)}"
        )
    before = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in _messages(prompt, "prompt", answer=False)
    ]
    return _with_tools(row, {"messages": before + _messages(completion, "completion")})


def _normalise_text(row: Row) -> dict[str, Any]:
    return {"text": _string(row["text"], "text")}


def _normalise_preference(row: Row) -> dict[str, Any]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not any(isinstance(value, list) for value in (prompt, chosen, rejected)):
        prompt = "" if prompt is None else _string(prompt, "prompt")
        return {"prompt": prompt, "chosen": _string(chosen, "chosen"), "rejected": _string(rejected, "rejected")}
    answers = {}
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        turns = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
        answers[name] = _messages(turns, name)
        if answers[name][-1]["role"] != "assistant":
            raise DataError(f"{name} must end with an assistant turn, not with {answers[name][-1]['role']!r}")
    chosen, rejected = answers["chosen"], answers["rejected"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    asked = [] if prompt is None else _messages(prompt, "prompt", answer=False) if prompt else []
    # Many sets repeat the prompt inside both answers; what both begin with is the prompt, whether it is given or not.
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and (not asked or chosen[shared - len(asked) : shared] == asked or chosen[: len(asked)] == asked):
        asked = []
    return {"prompt": asked + chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


_LABELS = {"true": True, "1": True, "false": False, "0": False}  # as .csv files have them


def _normalise_labelled(row: Row) -> dict[str, Any]:
    label = _LABELS.get(row["label"].lower(), row["label"]) if isinstance(row["label"], str) else row["label"]
    if not isinstance(label, int) or label not in (0, 1):
        shown = repr(label) if isinstance(label, int | float | str) else _kind(label)
        raise DataError(f"label must be true (a wanted answer) or false, not {shown}")
    prompt, completion = _asked(row["prompt"]), row["completion"]
    if isinstance(completion, str) and isinstance(prompt, list):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(completion, list):
        completion = _messages(completion, "completion")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    else:
        completion = _string(completion, "completion")
    return {"prompt": prompt, "completion": completion, "label": bool(label)}


def _normalise_prompt(row: Row) -> dict[str, Any]:
    """All other columns stay as they are: rewards read them."""
    return {**row, "prompt": _asked(row["prompt"])}


def _asked(prompt: Any) -> str | list[dict[str, Any]]:
    """A prompt that is there: text, or messages."""
    if isinstance(prompt, list):
        return _messages(prompt, "prompt", answer=False)
    if not _string(prompt, "prompt").strip():
        raise DataError("prompt is empty")
    return str(prompt)


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("preference", ("chosen", "rejected"), _normalise_preference, ("prompt",)),
        Format("labelled", ("prompt", "completion", "label"), _normalise_labelled),
        Format("messages", ("messages",), _normalise_messages, ("tools",)),
        Format("sharegpt", ("conversations",), _normalise_sharegpt, ("system", "tools")),
        Format("prompt-completion", ("prompt", "completion"), _normalise_prompt_completion, ("tools",)),
        Format("alpaca", ("instruction", "output"), _normalise_alpaca, ("input",)),
        Format("text", ("text",), _normalise_text),
        Format("prompt", ("prompt",), _normalise_prompt),
    )
}
"""The formats by name, in the order in which :func:`recognise` tries them."""
