"""Images from anywhere, checked before they are decoded and turned into plain 8-bit pixels.

The file's first bytes decide its format, never its name. The size in its header is compared with ``max_pixels`` before
any pixel is decoded. Pillow's decoders are constructed directly: ``PIL.Image.open`` has limits in module globals of its
own, which belong to the program, not to this package.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

from PIL import Image, ImageFile

from ft_core.errors import FtError
from ft_vision.pixels import is_turned, to_8_bit, upright

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "ImageError",
    "frame_count",
    "image_format",
    "image_size",
    "read_frames",
    "read_image",
]

FORMATS = ("png", "jpeg", "webp", "gif", "bmp", "tiff")
"""The formats that are read."""

MAX_PIXELS = 64 * 1024 * 1024
"""The default limit on width times height: 8192 by 8192, 192 MiB as RGB."""

MAX_BYTES = 256 * 1024 * 1024
"""The default limit on the encoded size."""

MAX_FRAMES = 10_000
"""The limit on the frames of an animation, or the pages of a file."""

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)


class ImageError(FtError):
    """An image that cannot be used; the message names the file and the reason."""


def read_image(
    source: str | os.PathLike[str] | bytes | IO[bytes] | Image.Image,
    *,
    mode: Literal["RGB", "L"] = "RGB",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """Read one image as 8-bit pixels, the way it is meant to be seen.

    - The EXIF orientation is applied (unreadable EXIF data counts as none).
    - Transparent pixels are composited on white.
    - 16-bit greyscale is scaled to 8 bits (``round(v / 257)``), neither clipped nor cut off. Pillow itself keeps the
      upper 8 bits of 16-bit colour.
    - Palette, 1-bit, CMYK, YCbCr and greyscale images are converted. Colour profiles are dropped, not applied: the
      pixels are taken as sRGB.
    - Of an animation or a file with several pages, the first is read. A PIL image is read at the frame where it stands.

    Args:
        source: a path, the encoded bytes, a binary file (read from where it stands, left open), or a PIL image (left
            as it is).
        mode: ``"RGB"``, or ``"L"`` for greyscale (ITU-R 601 luma).
        max_pixels: the largest width times height; compared with the header, before anything is decoded. Decoding
            takes up to about 12 bytes a pixel for a moment.
        max_bytes: the largest encoded size.
        formats: which of :data:`FORMATS` to accept.

    Returns:
        A new image of the given mode, with no file behind it and no metadata.

    Raises:
        ImageError: the file is missing, unreadable, empty, too large, truncated or damaged, of another format, has
            no pixels or too many, or has pixels without a defined range (32-bit integers, floats).
        ValueError: ``mode`` or ``formats`` holds something else than what is named above.
    """
    if mode not in ("RGB", "L"):
        raise ValueError(f"mode is 'RGB' or 'L', not {mode!r}")
    if not set(formats) <= set(FORMATS):
        raise ValueError(
            f"formats are among {', '.join(FORMATS)}; not {', '.join(sorted(set(formats) - set(FORMATS)))}"
        )

    if isinstance(source, Image.Image):
        name = os.fspath(getattr(source, "filename", "") or "PIL image")
        _check_size(name, source.size, max_pixels)
        return _finish(name, source, mode)

    name, data = _read_bytes(source, max_bytes)
    with _checked(name, data, max_pixels, formats) as image:
        return _finish(name, image, mode)


def frame_count(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> int:
    """How many frames an animation has, or pages a file; 1 of a plain image. No pixel is decoded.

    Raises:
        ImageError: as :func:`image_size`; or they are more than :data:`MAX_FRAMES`.
    """
    name, data = _read_bytes(source, MAX_BYTES)
    with _checked(name, data, max_pixels, FORMATS) as image:
        try:
            count = int(getattr(image, "n_frames", 1))
        except Exception as error:  # as in _open
            raise _damaged(name, (image.format or "image").lower(), error) from error
    if count > MAX_FRAMES:
        raise ImageError(f"{name}: has {count:,} frames, more than {MAX_FRAMES:,}")
    return count


def read_frames(
    source: str | os.PathLike[str] | bytes, wanted: Sequence[int], *, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Frames of an animation, or pages of a file, each as :func:`read_image` gives the first.

    Args:
        source: a path, or the encoded bytes.
        wanted: their numbers from 0, in rising order: a frame is often told by what it changes of the one before.
        max_pixels: as for :func:`read_image`, of each.

    Raises:
        ImageError: as :func:`read_image`, as it is iterated; or there is no such frame.
    """
    name, data = _read_bytes(source, MAX_BYTES)
    with _checked(name, data, max_pixels, FORMATS) as image:
        for number in wanted:
            try:
                image.seek(number)
            except Exception as error:  # as in _open
                raise _damaged(f"{name}, frame {number}", (image.format or "image").lower(), error) from error
            _check_size(f"{name}, frame {number}", image.size, max_pixels)
            if image.format == "TIFF":
                _check_tiles(name, image, max_pixels)
            yield _finish(f"{name}, frame {number}", image, "RGB")


def image_format(data: bytes) -> str | None:
    """Which of :data:`FORMATS` a file is, by its first 16 bytes; None if it is none."""
    return _format_of(data)


def image_size(
    source: str | os.PathLike[str] | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height of the image that :func:`read_image` gives, from the header: no pixel is decoded.

    Args:
        source: a path, the encoded bytes, or a PIL image.
        max_pixels: as for :func:`read_image`.

    Raises:
        ImageError: as :func:`read_image`, save for what shows only in the pixels.
    """
    if isinstance(source, Image.Image):
        _check_size("PIL image", source.size, max_pixels)
        return (source.height, source.width) if is_turned(source) else source.size
    name, data = _read_bytes(source, MAX_BYTES)
    with _checked(name, data, max_pixels, FORMATS) as image:
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow say its size as it is, others as it is meant
            tags: Any = getattr(image, "tag_v2", {})
            width, height = int(tags[256]), int(tags[257])  # ImageWidth, ImageLength
        return (height, width) if is_turned(image) else (width, height)


def _checked(name: str, data: bytes, max_pixels: int, formats: Sequence[str]) -> ImageFile.ImageFile:
    """The image, open but not decoded, of a format and size that are accepted."""
    found = _format_of(data)
    if found is None or found not in formats:
        what = f"is a {found} file" if found else "holds no image format that is known here"
        raise ImageError(f"{name}: {what}; read are {', '.join(formats)}: convert it to one of them")
    if size := _early_size(found, data):
        _check_size(name, size, max_pixels)
    image = _open(name, found, data)
    try:
        _check_size(name, image.size, max_pixels)
        if found == "tiff":
            _check_tiles(name, image, max_pixels)
    except ImageError:
        image.close()
        raise
    return image


def _read_bytes(source: str | os.PathLike[str] | bytes | IO[bytes], max_bytes: int) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = f"image of {len(source)} bytes", bytes(source)
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        try:
            with open(source, "rb", opener=_open_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ImageError(f"{name}: is not a file")
                data = file.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"{name}: cannot be read: {reason}") from error
    elif callable(getattr(source, "read", None)):
        label = getattr(source, "name", None)
        name = label if isinstance(label, str) else "image file object"
        data = source.read(max_bytes + 1)
        if not isinstance(data, bytes):
            raise ImageError(f"{name}: gives {type(data).__name__}, not bytes: open it in binary mode ('rb')")
    else:
        raise TypeError(f"an image is a path, bytes, a binary file or a PIL image, not {type(source).__name__}")
    if not data:
        raise ImageError(f"{name}: is empty")
    if len(data) > max_bytes:
        raise ImageError(f"{name}: is larger than {max_bytes:,} bytes (max_bytes)")
    return name, data


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a named pipe at once instead of waiting for a writer; it is refused as no file a moment later."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _format_of(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for signature, name in _SIGNATURES if data.startswith(signature)), None)


def _open(name: str, found: str, data: bytes) -> ImageFile.ImageFile:
    """Parse the header only; no pixel is decoded yet."""
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    decoders: dict[str, type[ImageFile.ImageFile]] = {
        "png": PngImagePlugin.PngImageFile,
        "jpeg": JpegImagePlugin.JpegImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
        "gif": GifImagePlugin.GifImageFile,
        "bmp": BmpImagePlugin.BmpImageFile,
        "tiff": TiffImagePlugin.TiffImageFile,
    }
    try:
        return decoders[found](io.BytesIO(data), "")
    except Exception as error:  # a decoder on foreign bytes raises anything: struct.error, KeyError, SyntaxError, …
        raise _damaged(name, found, error) from error


def _finish(name: str, image: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as in _open
        raise _damaged(name, (image.format or "image").lower(), error) from error
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ImageError(f"{name}: has {kind} pixels, whose range is not defined: scale them to 8 or 16 bits first")
    try:
        result = upright(to_8_bit(image, mode), image)
    except (ValueError, OSError, MemoryError) as error:
        raise ImageError(f"{name}: {image.mode} pixels cannot be converted to {mode}: {error}") from error
    return result


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: has {width} x {height} = {width * height:,} pixels, more than {max_pixels:,} (max_pixels)"
        )


def _check_tiles(name: str, image: Any, max_pixels: int) -> None:
    """A TIFF names the size of its tiles apart from its own, and a decoder allocates for a tile."""
    width, height = image.tag_v2.get(322), image.tag_v2.get(323)  # TileWidth, TileLength
    if isinstance(width, int) and isinstance(height, int):
        _check_size(f"{name}: a tile", (width, height), max(max_pixels, 1 << 20))  # a small image may have one big tile


def _early_size(found: str, data: bytes) -> tuple[int, int] | None:
    """Width and height where they stand at a fixed place, or None; Pillow says the others.

    For WebP this is a must: Pillow's decoder allocates the whole canvas when it is constructed.
    """
    if found == "png" and len(data) >= 24:  # PNG specification, 11.2.1
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if found == "webp":  # RFC 9649, sections 2.5 to 2.7
        chunk = data[12:16]
        if chunk == b"VP8X" and len(data) >= 30:
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        if chunk == b"VP8L" and len(data) >= 25:
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        if chunk == b"VP8 " and len(data) >= 30:
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _damaged(name: str, found: str, error: Exception) -> ImageError:
    return ImageError(f"{name}: is a truncated or damaged {found} file ({type(error).__name__}: {error})")
