"""Rows of conversations with images, in one normal form.

``{"messages": [{"role", "content"}], "images": [reference, …]}``: a content is a string or, where there are images, a
list of ``{"type": "image"}`` and ``{"type": "text", "text": …}``; the references are those of the images in their
order: an absolute path, a ``data:`` URL with the encoded image in base64, the URL of an image that may be fetched, or a
frame of a video (:mod:`ft_vision.frames`). Text is read and checked as ft_core reads it.
A row of which several answers are accepted lists them as ``answers``.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ft_core.data import Format
from ft_core.errors import DataError
from ft_vision import frames
from ft_vision.fetching import cached, check_url, is_url, url_of
from ft_vision.images import ImageError
from ft_vision.settings import VisionSettings

if TYPE_CHECKING:
    from PIL import Image

    from ft_core.config import TrainConfig

__all__ = ["ANSWERS", "image_name", "normalise", "open_reference", "reference_of", "said_of"]

PLACE = "\ufdd0"
"""Stands for an image while a content is a string: no character, and never one of a text (Unicode 16, 23.7)."""

WRITTEN = "<image>"
"""What stands for an image in the strings of many data sets, LLaVA's first."""

FRAME = "\ufdd1"
"""The same of a frame of a video."""

WRITTEN_VIDEO = "<video>"
"""What stands for a video in such strings."""

ANSWERS = "answers"
"""The column with all answers that are right, of which one is learnt."""

PREFIX = "data:"


def normalise(
    row: Mapping[str, Any], format: Format, folder: Path | None, *, config: TrainConfig | None = None
) -> dict[str, Any]:
    """A row with images in its normal form; see :attr:`ft_core.plugins.ModalitySpec.rows`.

    Images are given in the messages' parts, ``{"type": "image", "image": X}``, or in the row's column ``images`` (a
    list) or ``image``, for parts ``{"type": "image"}`` or the word ``<image>`` in strings; where nothing says their
    places, they stand before the first user's text, as in TRL. X is a path (relative ones are looked for from the data
    file's folder), a ``data:`` URL, an object with ``bytes`` or ``path`` (as parquet files of the Hub have it), a PIL
    image, or, where the configuration allows it, a URL.

    A video stands in a part ``{"type": "video", "video": X}``, or in the row's column ``videos`` or ``video``, for
    parts ``{"type": "video"}`` or the word ``<video>``. X is a list of images, or as for images. In its place
    stand as many images as ``vision.video_frames`` says.

    Args:
        config: says how many frames are taken of a video, and which URLs are allowed; None: as by default.

    Raises:
        DataError: no conversation, no image or too many, or one given in another way.
    """
    from ft_vision.asking import ASKING, normalise_asking

    if format.name in ASKING:
        return normalise_asking(row, format, folder, config)
    listed = _listed(row)
    seen = _Seen(row, folder, config)
    columns = {name: value for name, value in row.items() if name not in _SEEN}
    for name in ("messages", "prompt", "completion", "conversations"):
        if isinstance(columns.get(name), list):
            columns[name] = [_flat(message, name, number, seen) for number, message in enumerate(columns[name])]
    normal = format.normalise(columns)
    if "messages" not in normal:
        raise DataError("holds no conversation: task: vision trains on messages, or prompt and completion as messages")
    if seen.images and listed:
        raise DataError("gives images in its messages and in a column too: keep one of the two")
    messages = _with_words(normal["messages"], listed)
    if seen.videos and seen.frames:
        raise DataError(f"has {len(seen.videos)} more videos than places for them")
    if seen.videos:
        messages = _before(messages, "".join(seen.show(None, "the row") for _ in list(seen.videos)))
    written = "".join(str(message.get("content", "")) for message in messages)
    images = seen.images or listed
    if len(images) != written.count(PLACE):
        raise DataError(f"has {len(images)} images for {written.count(PLACE)} places")
    made: dict[str, Any] = {"messages": [_parts(message, number) for number, message in enumerate(messages)]}
    if normal.get("tools"):
        made["tools"] = normal["tools"]
    if row.get(ANSWERS) is not None:
        made[ANSWERS] = _accepted(row[ANSWERS])
    left = iter(_reference(image, f"image {number + 1}", folder, config) for number, image in enumerate(images))
    shown = iter(seen.frames)
    made["images"] = [next(left if mark == PLACE else shown) for mark in written if mark in (PLACE, FRAME)]
    return made


_SEEN = ("images", "image", "videos", "video")
"""Columns of a row that hold what is seen."""


class _Seen:
    """What a row's messages show, in the order in which they do.

    Attributes:
        images: what is given of each image in a part of its own. frames: references to those of the videos.
        videos: those of the row's column that have had no place yet.
    """

    def __init__(self, row: Mapping[str, Any], folder: Path | None, config: TrainConfig | None) -> None:
        videos = row.get("videos")
        if videos is not None and not isinstance(videos, list):
            raise DataError(f"videos must be a list, not {_kind(videos)}")
        self.images: list[Any] = []
        self.frames: list[str] = []
        self.videos = list(videos or ([] if row.get("video") is None else [row["video"]]))
        self._in_column = bool(self.videos)
        self._folder, self._config = folder, config

    def show(self, video: Any, where: str) -> str:
        """Note the frames of a video; the places for them. None is the column's next."""
        if video is None:
            if not self.videos:
                raise DataError(f"{where} has a place for a video that is not given")
            video = self.videos.pop(0)
        references = _frames(video, f"{where}'s video", self._folder, self._config)
        self.frames += references
        return FRAME * len(references)

    def words(self, text: str, where: str) -> str:
        """A text with places where it has the word for a video of the row's column."""
        if not self._in_column:
            return text
        first, *others = text.split(WRITTEN_VIDEO)
        return first + "".join(self.show(None, where) + other.removeprefix("\n") for other in others)


def _frames(video: Any, where: str, folder: Path | None, config: TrainConfig | None) -> list[str]:
    """References to the frames that are taken of a video."""
    most = _settings(config).video_frames
    if isinstance(video, list):
        if not video:
            raise DataError(f"{where} has no frames")
        chosen = frames.spread(len(video), most)
        return [_reference(video[number], f"{where}, frame {number + 1}", folder, config) for number in chosen]
    if isinstance(video, Mapping):
        video = video.get("bytes") or video.get("path")
    if isinstance(video, str) and is_url(video):
        raise DataError(f"{where} is a URL, {_short(video)}: of URLs only images are fetched; give the path of a file")
    data: bytes | None = None
    if isinstance(video, bytes | bytearray):
        data = bytes(video)
    elif isinstance(video, str) and video.startswith(PREFIX):
        data = _decoded(video, where)
    if data is None:
        return frames.frame_references(_path(video, where, folder), most)
    try:
        return [reference_of(image) for image in frames.video_frames(data, most)]
    except ImageError as error:
        raise DataError(f"{where}: {error}") from None


def _settings(config: TrainConfig | None) -> VisionSettings:
    from ft_vision.loading import settings_of

    return VisionSettings() if config is None else settings_of(config)


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


def _flat(message: Any, column: str, number: int, seen: _Seen) -> Any:
    """A message whose content is a string with a place for every image and frame, which are added to those seen."""
    if not isinstance(message, Mapping):
        return message
    for key in ("content", "value"):
        content, where = message.get(key), f"{column}[{number}]'s {key}"
        if isinstance(content, str):
            _check_text(content, where)
            message = {**message, key: seen.words(content, where)}
        if isinstance(content, list):
            words = [_word(part, where, seen) for part in content]
            message = {**message, key: "".join(words)}
    return message


def _check_text(text: str, where: str) -> None:
    if PLACE in text or FRAME in text:
        raise DataError(f"{where} holds U+{ord(PLACE if PLACE in text else FRAME):X}, which is no character of a text")


def _word(part: Any, where: str, seen: _Seen) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _check_text(part["text"], where)
        return str(part["text"])
    if kind == "image":
        _note(_given(part, "image", "path", "url", "base64"), seen)
        return PLACE
    if kind == "video":
        return seen.show(_given(part, "video", "frames", "path", "url"), where)
    if kind == "image_url":  # OpenAI's
        given = part.get("image_url")
        _note(given.get("url") if isinstance(given, Mapping) else given, seen)
        return PLACE
    shown = repr(kind) if isinstance(part, Mapping) else _kind(part)
    raise DataError(f"{where} has a part of type {shown}: read are text, image and video")


def _given(part: Mapping[str, Any], *keys: str) -> Any:
    """What the first of these keys holds that is there."""
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _note(image: Any, seen: _Seen) -> None:
    """Note an image that is given where it stands; what is not stands in the row's column."""
    if image is not None:
        seen.images.append(image)


def _with_words(messages: Sequence[dict[str, Any]], listed: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages with a place for each image of the column, where the messages have none yet."""
    if not listed or any(PLACE in str(message.get("content", "")) for message in messages):
        return list(messages)
    if any(WRITTEN in str(message.get("content", "")) for message in messages):
        return [
            {**message, "content": _trimmed(message["content"])} if isinstance(message.get("content"), str) else message
            for message in messages
        ]
    return _before(messages, PLACE * len(listed))


def _before(messages: Sequence[dict[str, Any]], places: str) -> list[dict[str, Any]]:
    """Messages with these places before the first user's text."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("has images, but no user's turn for them to stand in")
    before = {**messages[first], "content": places + str(messages[first].get("content", ""))}
    return [*messages[:first], before, *messages[first + 1 :]]


def _trimmed(content: str) -> str:
    """The places of ``<image>``; LLaVA's line break between an image and the text belongs to the writing, not to it."""
    return content.replace(WRITTEN + "\n", PLACE).replace("\n" + WRITTEN, PLACE).replace(WRITTEN, PLACE)


def _parts(message: dict[str, Any], number: int) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str) or not (PLACE in content or FRAME in content):
        return message
    if message["role"] == "assistant":
        raise DataError(f"messages[{number}] is an assistant's with an image: only text is learnt")
    parts: list[dict[str, str]] = []
    for place, text in enumerate(content.replace(FRAME, PLACE).split(PLACE)):
        if place:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {**message, "content": parts}


def _reference(image: Any, where: str, folder: Path | None, config: TrainConfig | None) -> str:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return _url(bytes(image))
    if callable(getattr(image, "save", None)):  # a PIL image, as the Hub's data sets give
        return reference_of(image)
    if isinstance(image, str) and image.startswith(PREFIX):
        _decoded(image, where)
        return image
    if isinstance(image, str) and image.startswith(frames.PREFIX):  # of a row that was in its normal form already
        return image
    if isinstance(image, str) and is_url(image):
        try:
            return check_url(url_of(image), _settings(config).allow_urls)
        except ImageError as error:
            raise DataError(f"{where} is a URL, {_short(url_of(image))}: {error}") from None
    return _path(image, where, folder)


def _path(given: Any, where: str, folder: Path | None) -> str:
    """An absolute path."""
    if not isinstance(given, str) or not given:
        raise DataError(f"{where} must be a path, a data: URL, or an object with 'bytes' or 'path', not {_kind(given)}")
    if "://" in given and not given.lower().startswith("file://"):
        raise DataError(f"{where} is a URL, {_short(given)}, of a kind that is not read: http, https and file are")
    try:
        path = _of_file_url(given, where) if "://" in given else Path(given).expanduser()
    except RuntimeError:  # pathlib's, of ~ and a name that no user has
        raise DataError(f"{where} is {_short(given)}, of a user whom this machine does not know") from None
    if folder is None and not path.is_absolute():
        raise DataError(f"{where} is a relative path, {_short(given)}, in rows that come from no file of this machine")
    return os.path.abspath(path if folder is None else folder / path)


def _of_file_url(url: str, where: str) -> Path:
    host, _, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost"):  # RFC 8089, 2
        raise DataError(f"{where} is {_short(url)}, a file of the host {_short(host)}: write file:///folder/a.png")
    return Path("/" + unquote(path))


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


def open_reference(reference: str) -> str | bytes | Image.Image:
    """A reference of the normal form as :func:`ft_vision.read_image` takes it: a path, the encoded bytes, or a frame.

    A URL's image is fetched unless it is in the cache.

    Raises:
        ImageError: it cannot be fetched, or it is a frame of a video that cannot be used.
    """
    if reference.startswith(PREFIX):
        return _decoded(reference, "an image")
    if is_url(reference):
        return str(cached(reference))
    return frames.read_frame(reference) if reference.startswith(frames.PREFIX) else reference


def said_of(reference: str, error: ImageError) -> str:
    """What is wrong with an image, for a person: of a URL's its name too, not only that of the file in the cache."""
    line = str(error)
    return (
        f"{image_name(reference)}, fetched to {line}" if is_url(reference) and url_of(reference) not in line else line
    )


def image_name(reference: str) -> str:
    """A reference, short, for a person."""
    if reference.startswith(PREFIX):
        return "an image in the data itself"
    if is_url(reference):
        return _short(url_of(reference))
    if reference.startswith(frames.PREFIX):
        place, _, path = reference.removeprefix(frames.PREFIX).partition(":")
        number, _, count = place.partition("/")
        return f"frame {int(number) + 1} of {count} of {path}"
    return reference


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _kind(value: Any) -> str:
    return {"NoneType": "null", "str": "text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )
