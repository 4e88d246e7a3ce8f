"""Rows of conversations with images, in one normal form.

``{"messages": [{"role", "content"}], "images": [reference, …]}``: a content is a string or, where there are images, a
list of ``{"type": "image"}`` and ``{"type": "text", "text": …}``; the references are those of the images in their
order: an absolute path, or a ``data:`` URL with the encoded image in base64. Text is read and checked as ft_core reads
it. A row of which several answers are accepted lists them as ``answers``.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ft_core.data import Format
from ft_core.errors import DataError

__all__ = ["image_name", "normalise", "open_reference", "reference_of"]

PLACE = "\ufdd0"
"""Stands for an image while a content is a string: no character, and never one of a text (Unicode 16, 23.7)."""

WRITTEN = "<image>"
"""What stands for an image in the strings of many data sets, LLaVA's first."""

PREFIX = "data:"


def normalise(row: Mapping[str, Any], format: Format, folder: Path | None) -> dict[str, Any]:
    """A row with images in its normal form; see :attr:`ft_core.plugins.ModalitySpec.rows`.

    Images are given in the messages' parts, ``{"type": "image", "image": X}``, or in the row's column ``images`` (a
    list) or ``image``, for parts ``{"type": "image"}`` or the word ``<image>`` in strings; where nothing says their
    places, they stand before the first user's text, as in TRL. X is a path (relative ones are looked for from the data
    file's folder), a ``data:`` URL, an object with ``bytes`` or ``path`` (as parquet files of the Hub have it) or a PIL
    image.

    Raises:
        DataError: no conversation, no image or too many, or one given in another way.
    """
    listed = _listed(row)
    found: list[Any] = []
    columns = {name: value for name, value in row.items() if name not in ("images", "image")}
    for name in ("messages", "prompt", "completion", "conversations"):
        if isinstance(columns.get(name), list):
            columns[name] = [_flat(message, name, number, found) for number, message in enumerate(columns[name])]
    normal = format.normalise(columns)
    if "messages" not in normal:
        raise DataError("holds no conversation: task: vision trains on messages, or prompt and completion as messages")
    given = [image for image in found if image is not None]
    if given and listed:
        raise DataError("gives images in its messages and in a column too: keep one of the two")
    messages = _with_words(normal["messages"], listed)
    places = sum(str(message.get("content", "")).count(PLACE) for message in messages)
    images = given or listed
    if len(images) != places:
        raise DataError(f"has {len(images)} images for {places} places")
    made: dict[str, Any] = {"messages": [_parts(message, number) for number, message in enumerate(messages)]}
    if normal.get("tools"):
        made["tools"] = normal["tools"]
    made["images"] = [_reference(image, number, folder) for number, image in enumerate(images)]
    if row.get("answers") is not None:
        made["answers"] = _accepted(row["answers"])
    return made


def _accepted(answers: Any) -> list[str]:
    """What a row accepts beside the answer that it ends with: texts, or objects with an ``answer`` as VQA has them."""
    listed = [answers] if isinstance(answers, str) else answers
    found: list[Any] = []
    if isinstance(listed, list):
        found = [one.get("answer") if isinstance(one, Mapping) else one for one in listed]
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) == len(found):
            return list(dict.fromkeys(texts))
    other = next((_kind(text) for text in found if not isinstance(text, str)), None)
    what = f"a list with {other}" if other else _kind(answers)
    raise DataError(f"answers must be a list of texts, those that are accepted, not {what}")


def _listed(row: Mapping[str, Any]) -> list[Any]:
    """The images of the row's own column."""
    listed = row.get("images")
    if listed is None:
        listed = [] if row.get("image") is None else [row["image"]]
    elif not isinstance(listed, list):
        raise DataError(f"images must be a list, not {_kind(listed)}")
    return listed


def _flat(message: Any, column: str, number: int, found: list[Any]) -> Any:
    """A message whose content is a string with a place for every image; the images are added to those found."""
    if not isinstance(message, Mapping):
        return message
    for key in ("content", "value"):
        content, where = message.get(key), f"{column}[{number}]'s {key}"
        if isinstance(content, str) and PLACE in content:
            raise DataError(f"{where} holds U+FDD0, which is no character of a text")
        if isinstance(content, list):
            words = [_word(part, where, found) for part in content]
            message = {**message, key: "".join(words)}
    return message


def _word(part: Any, where: str, found: list[Any]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str) and PLACE not in part["text"]:
        return str(part["text"])
    if kind == "image":
        keys = [key for key in ("image", "path", "url", "base64") if part.get(key) is not None]
        found.append(part[keys[0]] if keys else None)
        return PLACE
    if kind == "image_url":  # OpenAI's
        given = part.get("image_url")
        found.append(given.get("url") if isinstance(given, Mapping) else given)
        return PLACE
    shown = repr(kind) if isinstance(part, Mapping) else _kind(part)
    raise DataError(f"{where} has a part of type {shown}: read are text and image")


def _with_words(messages: Sequence[dict[str, Any]], listed: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with a place for each image of the column, where the messages have none yet."""
    if not listed or any(PLACE in str(message.get("content", "")) for message in messages):
        return list(messages)
    if any(WRITTEN in str(message.get("content", "")) for message in messages):
        return [
            {**message, "content": _trimmed(message["content"])} if isinstance(message.get("content"), str) else message
            for message in messages
        ]
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("has images, but no user's turn for them to stand in")
    before = {**messages[first], "content": PLACE * len(listed) + str(messages[first].get("content", ""))}
    return [*messages[:first], before, *messages[first + 1 :]]


def _trimmed(content: str) -> str:
    """The places of ``<image>``; LLaVA's line break between an image and the text belongs to the writing, not to it."""
    return content.replace(WRITTEN + "\n", PLACE).replace("\n" + WRITTEN, PLACE).replace(WRITTEN, PLACE)


def _parts(message: dict[str, Any], number: int) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str) or PLACE not in content:
        return message
    if message["role"] == "assistant":
        raise DataError(f"messages[{number}] is an assistant's with an image: only text is learnt")
    parts: list[dict[str, str]] = []
    for place, text in enumerate(content.split(PLACE)):
        if place:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {**message, "content": parts}


def _reference(image: Any, number: int, folder: Path | None) -> str:
    where = f"image {number + 1}"
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return _url(bytes(image))
    if callable(getattr(image, "save", None)):  # a PIL image, as the Hub's data sets give
        return reference_of(image)
    if not isinstance(image, str) or not image:
        raise DataError(f"{where} must be a path, a data: URL, or an object with 'bytes' or 'path', not {_kind(image)}")
    if image.startswith(PREFIX):
        _decoded(image, where)
        return image
    if image.startswith(("http://", "https://")):
        raise DataError(f"{where} is a URL, {_short(image)}: nothing is downloaded; fetch it, and give the file's path")
    path = Path(image.removeprefix("file://")).expanduser()
    if folder is None and not path.is_absolute():
        raise DataError(f"{where} is a relative path, {_short(image)}, in rows that come from no file of this machine")
    return os.path.abspath(path if folder is None else folder / path)


def reference_of(image: Any) -> str:
    """A reference to a PIL image, which then lies in the reference itself, as a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _url(buffer.getvalue())


def _url(data: bytes) -> str:
    return f"{PREFIX}image;base64,{base64.b64encode(data).decode()}"


def _decoded(url: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{where} is a data: URL without base64: write data:image/png;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where} is no base64: {error}") from None


def open_reference(reference: str) -> str | bytes:
    """A reference of the normal form as :func:`ft_vision.read_image` takes it: a path, or the encoded bytes."""
    return _decoded(reference, "an image") if reference.startswith(PREFIX) else reference


def image_name(reference: str) -> str:
    """A reference, short, for a person."""
    return "an image in the data itself" if reference.startswith(PREFIX) else reference


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )
