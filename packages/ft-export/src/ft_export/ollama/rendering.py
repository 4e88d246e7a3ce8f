"""How Ollama makes a prompt of a conversation and a template: messages put together, and the two ways to run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ft_export.ollama.go_template import Template

__all__ = ["Message", "collate", "render"]

Message = Mapping[str, Any]
"""A message as transformers has it: ``role`` and ``content``."""


def collate(messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
    """All system messages as one text, and the messages with neighbours of one role put together."""
    system, joined = [], list[dict[str, Any]]()
    for message in messages:
        role, content = str(message["role"]), str(message["content"])
        if role == "system":
            system.append(content)
        if joined and joined[-1]["Role"] == role and role != "tool":
            joined[-1]["Content"] += f"\n\n{content}"
        else:
            joined.append({"Role": role, "Content": content, "Thinking": "", "Images": [], "ToolCalls": []})
    return "\n\n".join(system), joined


def render(template: Template, messages: Sequence[Message]) -> str:
    """The prompt that Ollama makes of a conversation.

    A template that uses ``.Messages`` is run once. An older one has ``.System``, ``.Prompt`` and ``.Response``: it is
    run for each turn, and for the last one up to ``.Response``.

    Raises:
        GoTemplateError: as :meth:`Template.execute`.
    """
    system, joined = collate(messages)
    thinking = {"Think": False, "IsThinkSet": False}
    if "messages" in template.names:
        return template.execute({"System": system, "Messages": joined, "Tools": [], "Response": "", **thinking})
    if "response" not in template.names:
        template = template.with_response()
    parts, turn = [], {"System": "", "Prompt": "", "Response": ""}

    def finish() -> None:
        parts.append(template.execute({**turn, **thinking}))
        turn.update(System="", Prompt="", Response="")

    for message in joined:
        if message["Role"] == "system":
            if turn["Prompt"] or turn["Response"]:
                finish()
            turn["System"] = message["Content"]
        elif message["Role"] == "user":
            if turn["Response"]:
                finish()
            turn["Prompt"] = message["Content"]
        elif message["Role"] == "assistant":
            turn["Response"] = message["Content"]
    parts.append(template.until_response().execute({**turn, **thinking}))
    return "".join(parts)
