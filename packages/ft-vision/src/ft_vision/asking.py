"""Rows of preference and of prompts with images, in one normal form.

As :mod:`ft_vision.rows` has conversations: messages whose contents have places for images, and their references in
``images``. ``{"prompt", "chosen", "rejected", "images"}``, all images in the prompt; or ``{"prompt", "images"}`` with
all other columns of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_core.data import Format
from ft_core.errors import DataError
from ft_vision.rows import PLACE, _flat, _listed, _parts, _reference, _with_words

__all__ = ["ASKING", "normalise_asking"]

ASKING = ("preference", "prompt")
"""The formats that are read here."""


def normalise_asking(row: Mapping[str, Any], format: Format, folder: Path | None) -> dict[str, Any]:
    """A row of one of these formats in its normal form; images are given as in :func:`ft_vision.rows.normalise`.

    A prompt that is a string is a user's message. Where chosen and rejected repeat the prompt, they show its images.

    Raises:
        DataError: as there; or an image in an answer, or images that chosen and rejected do not share.
    """
    listed = _listed(row)
    columns = {name: value for name, value in row.items() if name not in ("images", "image")}
    read = ("prompt", "chosen", "rejected") if format.name == "preference" else ("prompt",)
    shown: list[list[Any]] = []
    for name in read:
        found: list[Any] = []
        if isinstance(columns.get(name), list):
            columns[name] = [_flat(message, name, number, found) for number, message in enumerate(columns[name])]
        elif isinstance(columns.get(name), str):
            if PLACE in columns[name]:
                raise DataError(f"{name} holds U+FDD0, which is no character of a text")
            role = "user" if name == "prompt" else "assistant"
            columns[name] = (
                [{"role": role, "content": columns[name]}] if columns[name].strip() or name != "prompt" else ""
            )
        if found and found not in shown:
            shown.append(found)
    if len(shown) > 1:
        raise DataError("shows other images in chosen than in rejected, or than in prompt: a pair answers one question")
    normal = format.normalise(columns)
    if format.name == "preference" and not normal["prompt"]:
        raise DataError("holds no prompt: task: vision compares answers to a user's turn")
    for name in read[1:]:
        if any(PLACE in str(message.get("content", "")) for message in normal[name]):
            raise DataError(f"{name} is an answer with an image: only text is learnt")
    given = [image for image in (shown[0] if shown else []) if image is not None]
    if given and listed:
        raise DataError("gives images in its messages and in a column too: keep one of the two")
    prompt = _with_words(normal["prompt"], listed)
    places = sum(str(message.get("content", "")).count(PLACE) for message in prompt)
    images = given or listed
    if len(images) != places:
        raise DataError(f"has {len(images)} images for {places} places")
    made = {**normal, "prompt": [_parts(message, number) for number, message in enumerate(prompt)]}
    made["images"] = [_reference(image, number, folder) for number, image in enumerate(images)]
    return made
