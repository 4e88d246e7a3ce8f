"""References to images, as rows in their normal form have them: made of what a data set gives, and opened."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ft_core.errors import DataError
from ft_vision import frames
from ft_vision.fetching import cached, check_url, is_url, url_of
from ft_vision.images import ImageError
from ft_vision.settings import MOST_FRAMES, VisionSettings

if TYPE_CHECKING:
    from PIL import Image

    from ft_core.config import TrainConfig

__all__ = [
    "DATA",
    "absolute_path",
    "decoded",
    "image_name",
    "kind_of",
    "open_reference",
    "reference",
    "reference_of",
    "said_of",
    "settings_or_default",
    "short",
]

DATA = "data:"
"""Begins a URL that holds the encoded image itself."""


def reference(image: Any, where: str, folder: Path | None, config: TrainConfig | None) -> str:
    """The reference to an image that a row gives in one of the ways of :func:`ft_vision.rows.normalise`.

    Raises:
        DataError: it is given in another way, or is a URL that is not allowed.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return _url(bytes(image))
    if callable(getattr(image, "save", None)):  # a PIL image, as the Hub's data sets give
        return reference_of(image)
    if isinstance(image, str) and image.startswith(DATA):
        decoded(image, where)
        return image
    if isinstance(image, str) and image.startswith(frames.PREFIX):  # of a row that was in its normal form already
        return _checked_frame(image, where, config)
    if isinstance(image, str) and is_url(image):
        try:
            return check_url(url_of(image), settings_or_default(config).allow_urls)
        except ImageError as error:
            raise DataError(f"{where} is a URL, {short(url_of(image))}: {error}") from None
    return absolute_path(image, where, folder)


def _checked_frame(given: str, where: str, config: TrainConfig | None) -> str:
    """A reference to a frame, which a row's own text may claim to be: of no more frames than are taken of a video."""
    try:
        _, count, path = frames.frame_of(given)
    except ImageError as error:
        raise DataError(f"{where}, {error}; of a file of that name write ./{short(given)}") from None
    most = MOST_FRAMES if config is None else settings_or_default(config).video_frames
    if count > most:
        raise DataError(f"{where} is one of {count} frames of {short(path)}: vision.video_frames allows {most}")
    return given


def absolute_path(given: Any, where: str, folder: Path | None) -> str:
    """An absolute path; ``where`` says where it was given, ``folder`` is where relative ones are looked for."""
    if not isinstance(given, str) or not given:
        raise DataError(
            f"{where} must be a path, a data: URL, or an object with 'bytes' or 'path', not {kind_of(given)}"
        )
    if "://" in given and not given.lower().startswith("file://"):
        raise DataError(f"{where} is a URL, {short(given)}, of a kind that is not read: http, https and file are")
    try:
        path = _of_file_url(given, where) if "://" in given else Path(given).expanduser()
    except RuntimeError:  # pathlib's, of ~ and a name that no user has
        raise DataError(f"{where} is {short(given)}, of a user whom this machine does not know") from None
    if folder is None and not path.is_absolute():
        raise DataError(f"{where} is a relative path, {short(given)}, in rows that come from no file of this machine")
    return os.path.abspath(path if folder is None else folder / path)


def _of_file_url(url: str, where: str) -> Path:
    host, _, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost"):  # RFC 8089, 2
        raise DataError(f"{where} is {short(url)}, a file of the host {short(host)}: write file:///folder/a.png")
    return Path("/" + unquote(path))


def reference_of(image: Any) -> str:
    """A reference to a PIL image, which then lies in the reference itself, as a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return _url(buffer.getvalue())


def _url(data: bytes) -> str:
    return f"{DATA}image;base64,{base64.b64encode(data).decode()}"


def decoded(url: str, where: str) -> bytes:
    """What a ``data:`` URL holds.

    Raises:
        DataError: it is not in base64.
    """
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
    if reference.startswith(DATA):
        return decoded(reference, "an image")
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
    if reference.startswith(DATA):
        return "an image in the data itself"
    if is_url(reference):
        return short(url_of(reference))
    if reference.startswith(frames.PREFIX):
        number, count, path = frames.frame_of(reference)
        return f"frame {number + 1} of {count} of {path}"
    return reference


def short(text: str) -> str:
    """A text of at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "…"


def kind_of(value: Any) -> str:
    """What a value of a row is, for a person."""
    return {"NoneType": "null", "str": "text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def settings_or_default(config: TrainConfig | None) -> VisionSettings:
    """The configuration's section ``vision``."""
    from ft_vision.loading import settings_of

    return VisionSettings() if config is None else settings_of(config)
