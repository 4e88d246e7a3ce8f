"""The model that Open WebUI imports: a name over the engine's model, with system prompt, parameters and suggestions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ft_export.conversations import Serving

__all__ = ["model_json", "unescaped"]

SUGGESTIONS, LONGEST = 4, 200
"""How many first questions are offered, of how many characters at most."""


def model_json(
    name: str,
    title: str,
    description: str,
    settings: Serving,
    engine: str,
    *,
    system: str | None,
    suggest: bool,
    sees: bool = False,
) -> dict[str, Any]:
    """The content of ``model.json``.

    Args:
        name: what the engine calls the model; Ollama's names have a tag.
        title: what people see.
        system: the system prompt, or None.
        suggest: whether questions of the held-out rows are offered to begin with.
        sees: whether the model takes images.
    """
    questions = [asked for asked in settings.questions if len(asked) <= LONGEST][:SUGGESTIONS] if suggest else []
    model = {
        "id": f"{name.partition(':')[0]}-chat",
        "base_model_id": name,
        "name": title,
        "meta": {
            "description": description,
            "capabilities": {
                "vision": sees,
                "image_generation": False,
                "code_interpreter": False,
                "web_search": False,
                "file_upload": True,
                "citations": True,
            },
            "suggestion_prompts": [{"content": asked} for asked in questions] or None,
        },
        "params": _parameters(settings, engine, system),
        "access_grants": [],  # the administrator's alone, until it is shared
        "is_active": True,
    }
    return {"models": [model]}


def _parameters(settings: Serving, engine: str, system: str | None) -> dict[str, Any]:
    """By the names that the engine knows: Open WebUI hands over what it does not know itself as it is."""
    names = {} if engine == "vllm" else {"repetition_penalty": "repeat_penalty"}
    parameters: dict[str, Any] = {"system": system} if system is not None else {}
    parameters |= {names.get(name, name): value for name, value in settings.sampling.items()}
    parameters["stop"] = [_escaped(stop) for stop in settings.stops]
    if engine == "ollama":
        parameters["num_ctx"] = settings.context
    return parameters


def _escaped(stop: str) -> str:
    """A stop text as Open WebUI wants it: it reads Python's escapes in it, by which other letters would be lost."""
    return stop.encode("unicode_escape").decode("ascii")


def unescaped(parameters: Mapping[str, Any]) -> list[str]:
    """The stop texts that Open WebUI makes of the parameters, by the line of code that it does it with."""
    return [bytes(stop, "utf-8").decode("unicode_escape") for stop in parameters["stop"]]
