"""What is seen in a row's messages: images and videos, found where they are given, and put into their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError
from ft_vision import frames
from ft_vision.fetching import is_url
from ft_vision.images import ImageError
from ft_vision.references import (
    DATA,
    absolute_path,
    decoded,
    kind_of,
    reference,
    reference_of,
    settings_or_default,
    short,
)

if TYPE_CHECKING:
    from ft_core.config import TrainConfig

__all__ = ["SEEN", "Seen", "check_text", "flat", "has_place"]

SEEN = ("images", "image", "videos", "video")
"""Columns of a row that hold what is seen."""

PLACE = "\ufdd0"
"""Stands for an image while a content is a string: no character, and never one of a text (Unicode 16, 23.7)."""

WRITTEN = "<image>"
"""What stands for an image in the strings of many data sets, LLaVA's first."""

FRAME = "\ufdd1"
"""The same of a frame of a video."""

WRITTEN_VIDEO = "<video>"
"""What stands for a video in such strings."""


class Seen:
    """What a row's messages show, in the order in which they do.

    Attributes:
        images: what is given of each image in a part of its own. listed: in the row's column. frames: references to
            those of the videos.
        videos: those of the row's column that have had no place yet.
    """

    def __init__(self, row: Mapping[str, Any], folder: Path | None, config: TrainConfig | None) -> None:
        videos = row.get("videos")
        if videos is not None and not isinstance(videos, list):
            raise DataError(f"videos must be a list, not {kind_of(videos)}")
        self.images: list[Any] = []
        self.listed = _listed(row)
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

    def placed(self, messages: Sequence[dict[str, Any]], column: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Messages whose images and frames are parts, and the references of these in their order.

        Raises:
            DataError: there are more places than images or videos, or fewer; or one is in an assistant's message.
        """
        if self.images and self.listed:
            raise DataError("gives images in its messages and in a column too: keep one of the two")
        messages = _with_words(messages, self.listed)
        if self.videos and self.frames:
            raise DataError(f"has {len(self.videos)} more videos than places for them")
        if self.videos:
            messages = _before(messages, "".join(self.show(None, "the row") for _ in list(self.videos)))
        written = "".join(str(message.get("content", "")) for message in messages)
        given = self.images or self.listed
        if len(given) != written.count(PLACE):
            raise DataError(f"has {len(given)} images for {written.count(PLACE)} places")
        parts = [_parts(message, f"{column}[{number}]") for number, message in enumerate(messages)]
        images = iter(
            reference(image, f"image {number + 1}", self._folder, self._config) for number, image in enumerate(given)
        )
        shown = iter(self.frames)
        return parts, [next(images if mark == PLACE else shown) for mark in written if mark in (PLACE, FRAME)]


def has_place(message: Mapping[str, Any]) -> bool:
    """Whether a message whose content is a string shows an image or a frame."""
    content = message.get("content")
    return isinstance(content, str) and (PLACE in content or FRAME in content)


def _frames(video: Any, where: str, folder: Path | None, config: TrainConfig | None) -> list[str]:
    """References to the frames that are taken of a video."""
    most = settings_or_default(config).video_frames
    if isinstance(video, list):
        if not video:
            raise DataError(f"{where} has no frames")
        chosen = frames.spread(len(video), most)
        return [reference(video[number], f"{where}, frame {number + 1}", folder, config) for number in chosen]
    if isinstance(video, Mapping):
        video = video.get("bytes") or video.get("path")
    if isinstance(video, str) and is_url(video):
        raise DataError(f"{where} is a URL, {short(video)}: of URLs only images are fetched; give the path of a file")
    data: bytes | None = None
    if isinstance(video, bytes | bytearray):
        data = bytes(video)
    elif isinstance(video, str) and video.startswith(DATA):
        data = decoded(video, where)
    if data is None:
        return frames.frame_references(absolute_path(video, where, folder), most)
    try:
        return [reference_of(image) for image in frames.video_frames(data, most)]
    except ImageError as error:
        raise DataError(f"{where}: {error}") from None


def _listed(row: Mapping[str, Any]) -> list[Any]:
    """The images of the row's own column."""
    listed = row.get("images")
    if listed is None:
        listed = [] if row.get("image") is None else [row["image"]]
    elif not isinstance(listed, list):
        raise DataError(f"images must be a list, not {kind_of(listed)}")
    return listed


def flat(message: Any, column: str, number: int, seen: Seen) -> Any:
    """A message whose content is a string with a place for every image and frame, which are added to those seen."""
    if not isinstance(message, Mapping):
        return message
    for key in ("content", "value"):
        content, where = message.get(key), f"{column}[{number}]'s {key}"
        if isinstance(content, str):
            check_text(content, where)
            message = {**message, key: seen.words(content, where)}
        if isinstance(content, list):
            words = [_word(part, where, seen) for part in content]
            message = {**message, key: "".join(words)}
    return message


def check_text(text: str, where: str) -> None:
    """Refuse a text that holds one of the characters that stand for what is seen."""
    if PLACE in text or FRAME in text:
        raise DataError(f"{where} holds U+{ord(PLACE if PLACE in text else FRAME):X}, which is no character of a text")


def _word(part: Any, where: str, seen: Seen) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        check_text(part["text"], where)
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
    shown = repr(kind) if isinstance(part, Mapping) else kind_of(part)
    raise DataError(f"{where} has a part of type {shown}: read are text, image and video")


def _given(part: Mapping[str, Any], *keys: str) -> Any:
    """What the first of these keys holds that is there."""
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _note(image: Any, seen: Seen) -> None:
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


def _parts(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not has_place(message):
        return message
    if message["role"] == "assistant":
        raise DataError(f"{where} is an assistant's with an image: only text is learnt")
    parts: list[dict[str, str]] = []
    for place, text in enumerate(message["content"].replace(FRAME, PLACE).split(PLACE)):
        if place:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {**message, "content": parts}
