"""Rows of preference and of prompts with images, in one normal form.

As :mod:`ft_vision.rows` has conversations: messages whose contents have places for images, and their references in
``images``. ``{"prompt", "chosen", "rejected", "images"}``, all images in the prompt; or ``{"prompt", "images"}`` with
all other columns of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.data import Format
from ft_core.errors import DataError
from ft_vision.seen import SEEN, Seen, check_text, flat, has_place

if TYPE_CHECKING:
    from ft_core.config import TrainConfig

__all__ = ["ASKING", "normalise_asking"]

ASKING = ("preference", "prompt")
"""The formats that are read here."""


def normalise_asking(
    row: Mapping[str, Any], format: Format, folder: Path | None, config: TrainConfig | None = None
) -> dict[str, Any]:
    """A row of one of these formats in its normal form; images and videos are given as in
    :func:`ft_vision.rows.normalise`, all of them in the prompt.

    A prompt that is a string is a user's message. Where chosen and rejected repeat the prompt, they show its images.

    Raises:
        DataError: as there; or an image in an answer, or images that chosen and rejected do not share.
    """
    columns = {name: value for name, value in row.items() if name not in SEEN}
    read = ("prompt", "chosen", "rejected") if format.name == "preference" else ("prompt",)
    shown: list[Seen] = []
    for name in read:
        seen = Seen(row, folder, config)
        if isinstance(columns.get(name), list):
            columns[name] = [flat(message, name, number, seen) for number, message in enumerate(columns[name])]
        elif isinstance(columns.get(name), str):
            check_text(columns[name], name)
            if name == "prompt":
                columns[name] = seen.words(columns[name], name)
            role = "user" if name == "prompt" else "assistant"
            columns[name] = (
                [{"role": role, "content": columns[name]}] if columns[name].strip() or name != "prompt" else ""
            )
        if (seen.images or seen.frames) and not any(_same(seen, other) for other in shown):
            shown.append(seen)
    if len(shown) > 1:
        raise DataError("shows other images in chosen than in rejected, or than in prompt: a pair answers one question")
    normal = format.normalise(columns)
    if format.name == "preference" and not normal["prompt"]:
        raise DataError("holds no prompt: task: vision compares answers to a user's turn")
    for name in read[1:]:
        if any(has_place(message) for message in normal[name]):
            raise DataError(f"{name} is an answer with an image: only text is learnt")
    seen = shown[0] if shown else Seen(row, folder, config)
    prompt, images = seen.placed(normal["prompt"], "prompt")
    return {**normal, "prompt": prompt, "images": images}


def _same(one: Seen, other: Seen) -> bool:
    return one.images == other.images and one.frames == other.frames
