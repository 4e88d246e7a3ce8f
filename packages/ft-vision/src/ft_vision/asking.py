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
from ft_vision.rows import (
    _SEEN,
    FRAME,
    PLACE,
    _before,
    _check_text,
    _flat,
    _listed,
    _parts,
    _reference,
    _Seen,
    _with_words,
)  # fmt: skip

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
    listed = _listed(row)
    columns = {name: value for name, value in row.items() if name not in _SEEN}
    read = ("prompt", "chosen", "rejected") if format.name == "preference" else ("prompt",)
    shown: list[_Seen] = []
    for name in read:
        seen = _Seen(row, folder, config)
        if isinstance(columns.get(name), list):
            columns[name] = [_flat(message, name, number, seen) for number, message in enumerate(columns[name])]
        elif isinstance(columns.get(name), str):
            _check_text(columns[name], name)
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
        if any(mark in str(message.get("content", "")) for message in normal[name] for mark in (PLACE, FRAME)):
            raise DataError(f"{name} is an answer with an image: only text is learnt")
    seen = shown[0] if shown else _Seen(row, folder, config)
    if seen.images and listed:
        raise DataError("gives images in its messages and in a column too: keep one of the two")
    prompt = _with_words(normal["prompt"], listed)
    if seen.videos and seen.frames:
        raise DataError(f"has {len(seen.videos)} more videos than places for them")
    if seen.videos:
        prompt = _before(prompt, "".join(seen.show(None, "the row") for _ in list(seen.videos)))
    written = "".join(str(message.get("content", "")) for message in prompt)
    images = seen.images or listed
    if len(images) != written.count(PLACE):
        raise DataError(f"has {len(images)} images for {written.count(PLACE)} places")
    made = {**normal, "prompt": [_parts(message, number) for number, message in enumerate(prompt)]}
    left = iter(_reference(image, f"image {number + 1}", folder, config) for number, image in enumerate(images))
    frames = iter(seen.frames)
    made["images"] = [next(left if mark == PLACE else frames) for mark in written if mark in (PLACE, FRAME)]
    return made


def _same(one: _Seen, other: _Seen) -> bool:
    return one.images == other.images and one.frames == other.frames
