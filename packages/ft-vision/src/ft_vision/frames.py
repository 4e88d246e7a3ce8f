"""Videos as the frames that are shown to a model: a few of them, evenly taken, each an image of its own.

Animations and files of several pages are Pillow's matter. Files of video are decoded by PyAV where it is installed.
What a file is, its first bytes decide: the demuxer is named to FFmpeg, which would otherwise guess, and might take a
file for a list of others that it would then open.
"""

from __future__ import annotations

import io
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

from PIL import Image

from ft_core.errors import DataError
from ft_vision.images import MAX_FRAMES, MAX_PIXELS, ImageError, frame_count, image_format, read_frames

__all__ = ["PREFIX", "frame_of", "frame_references", "read_frame", "spread", "video_frames"]

PREFIX = "frame:"
"""Begins a reference to one frame of a video: ``frame:2/8:/folder/a.mp4`` is the third of eight taken evenly."""

_REFERENCE = re.compile(rf"{PREFIX}(?P<number>[0-9]{{1,9}})/(?P<count>[0-9]{{1,9}}):(?P<path>.+)", re.DOTALL)

INSTALL = 'video is decoded by PyAV, which is not installed: pip install "ft-vision[video]", or give the frames'

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

_last = threading.local()
"""The frames that a thread decoded last: those of a video are asked for one after the other."""


def spread(total: int, most: int) -> list[int]:
    """The numbers of the frames that are taken of ``total``: all, or ``most`` at even distances from the first on.

    As in transformers' ``BaseVideoProcessor.sample_frames``: the k-th of n is at floor(k * total / n).
    """
    count = min(total, most)
    return [k * total // count for k in range(count)]


def frame_references(path: str, most: int) -> list[str]:
    """References to the frames that are taken of a video's file.

    Of a file that cannot be used there is one, and who reads that is told what is wrong.

    Raises:
        DataError: it needs PyAV, which is not installed.
    """
    try:
        count = min(_count(path), most)
    except ImageError:
        count = 1
    return [f"{PREFIX}{number}/{count}:{path}" for number in range(count)]


def frame_of(reference: str) -> tuple[int, int, str]:
    """The number of the frame that a reference names, of how many that are taken, and the video's absolute path.

    Raises:
        ImageError: it is no such reference.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None or int(found["number"]) >= int(found["count"]) or not os.path.isabs(found["path"]):
        raise ImageError(f"{_short(reference)}: is no reference to a frame, such as {PREFIX}0/8:/folder/a.mp4")
    return int(found["number"]), int(found["count"]), found["path"]


def read_frame(reference: str) -> Image.Image:
    """The image that a reference to a frame names, 8-bit RGB.

    Raises:
        ImageError: it names none, or the file cannot be read, is damaged or too large.
        DataError: it needs PyAV, which is not installed.
    """
    number, count, path = frame_of(reference)
    try:
        found = os.stat(path)
        state = (path, count, found.st_mtime_ns, found.st_size)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if getattr(_last, "state", None) != state:
        _last.state = None
        _last.frames = video_frames(path, count)
        _last.state = state
    if number >= len(_last.frames):
        raise ImageError(f"{path}: has {len(_last.frames)} frames where it had {count}: it has changed")
    frame: Image.Image = _last.frames[number]
    return frame


def video_frames(source: str | bytes, most: int) -> list[Image.Image]:
    """At most ``most`` frames of a video, evenly taken (:func:`spread`), as 8-bit RGB.

    Args:
        source: the path or the bytes of an animated GIF, WebP or PNG, of a TIFF of several pages, or, with PyAV, of an
            MP4, MOV, Matroska, WebM or AVI file.

    Raises:
        ImageError: it cannot be read, is damaged or too large.
        DataError: it needs PyAV, which is not installed.
    """
    wanted = spread(_count(source), most)
    return list(_decoded(source, wanted) if _container(source) else read_frames(source, wanted))


def _count(source: str | bytes) -> int:
    """How many frames a video has."""
    if _container(source) is None:
        return frame_count(source)
    with _Opened(source) as container:
        # What a header says of it may be missing or wrong, so packets are counted, none of which is decoded.
        count = sum(1 for packet in container.demux(video=0) if packet.size > 0)
    if not 1 <= count <= MAX_FRAMES * 100:
        raise ImageError(f"{_name(source)}: has {count:,} frames of video: allowed are 1 to {MAX_FRAMES * 100:,}")
    return count


def _decoded(source: str | bytes, wanted: Sequence[int]) -> Iterator[Image.Image]:
    """The frames of a file of video with these numbers; the last one in the place of any that are not there."""
    left, last, image = list(wanted), None, None
    with _Opened(source) as container:
        for number, frame in enumerate(container.decode(video=0)):
            last = frame
            if left and number == left[0]:
                image = _picture(source, frame)
                while left and number == left[0]:
                    left.pop(0)
                    yield image
            if not left:
                return
    if last is None:
        raise ImageError(f"{_name(source)}: no frame of it can be decoded")
    image = _picture(source, last)  # packets that hold no frame of their own were counted
    yield from [image] * len(left)


def _picture(source: str | bytes, frame: Any) -> Image.Image:
    _check_size(source, frame.width, frame.height)
    image: Image.Image = frame.to_image()
    turn = _TURNS.get(getattr(frame, "rotation", 0) % 360)  # as a phone was held; counterclockwise
    return image if turn is None else image.transpose(turn)


def _check_size(source: str | bytes, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{_name(source)}: has frames of {width} x {height} pixels, more than {MAX_PIXELS:,}")


class _Opened:
    """An open container, and its errors as ours."""

    def __init__(self, source: str | bytes) -> None:
        self._source = source
        self._container: Any = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Any:
        try:
            import av
        except ImportError:
            raise DataError(f"{_name(self._source)}: {INSTALL}") from None
        self._file = io.BytesIO(self._source) if isinstance(self._source, bytes) else open(self._source, "rb")
        try:
            self._container = av.open(self._file, format=_container(self._source))
            stream = self._container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
        except IndexError:
            self._close()
            raise ImageError(f"{_name(self._source)}: has no video in it") from None
        except Exception as error:  # as FFmpeg's errors come, of no common base
            self._close()
            raise self._damaged(error) from error
        try:
            _check_size(self._source, width, height)
        except ImageError:
            self._close()
            raise
        return self._container

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._close()
        if isinstance(error, Exception) and not isinstance(error, ImageError):
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ImageError:
        what = f"is a truncated or damaged file of video ({type(error).__name__}: {error})"
        return ImageError(f"{_name(self._source)}: {what}")

    def _close(self) -> None:
        for one in (self._container, self._file):
            if one is not None:
                one.close()


def _container(source: str | bytes) -> str | None:
    """FFmpeg's name for the kind of file that a video is, or None if it is Pillow's.

    Raises:
        ImageError: it is neither, or cannot be read.
    """
    if isinstance(source, bytes):
        head = source[:16]
    else:
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):
                raise ImageError(f"{source}: is not a file")
            with open(source, "rb") as file:
                head = file.read(16)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise ImageError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if image_format(head) is not None:
        return None
    if head[4:8] == b"ftyp":  # ISO/IEC 14496-12, 4.3
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":  # EBML: RFC 8794, 11.2.1
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    raise ImageError(
        f"{_name(source)}: holds no video that is known here; read are animated GIF, WebP and PNG, TIFF, MP4, MOV, "
        "Matroska, WebM and AVI"
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _name(source: str | bytes) -> str:
    return f"video of {len(source)} bytes" if isinstance(source, bytes) else source
