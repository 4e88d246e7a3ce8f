"""Images of held-out rows, read as a training sees them: upright, on white, and checked before they are decoded.

A training reads images by ft-vision, which this package does without. What a proof compares is what a model says of
them, so they must not be others: turned, with black where nothing is, or of a size that a training refuses.
"""

from __future__ import annotations

import base64
import io
import os
import stat
import warnings
from typing import Any

from ft_export.errors import ExportError

__all__ = ["MAX_BYTES", "MAX_PIXELS", "NotReadError", "open_image"]

MAX_PIXELS = 64 * 1024 * 1024
"""Width times height of an image, at most; as in a training."""
MAX_BYTES = 256 * 1024 * 1024
"""Of an encoded image, at most; as in a training."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112
"""The tag of EXIF 2.32, table 4."""
TILE = (322, 323)
"""TIFF's tags TileWidth and TileLength: a decoder allocates for a tile, whatever the image's own size."""
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


class NotReadError(ExportError):
    """An image that a proof does not read; the message is of the form "a URL, which is not fetched"."""


def open_image(reference: str) -> Any:
    """The image that a row's reference names, as a training sees it: 8-bit RGB, an image of Pillow's.

    EXIF's orientation is applied, transparent pixels are put on white, 16-bit grey is scaled; of an animation it is the
    first image. The size in the header is compared with ``MAX_PIXELS`` before any pixel is decoded.

    Args:
        reference: a path, or a ``data:`` URL with base64.

    Raises:
        NotReadError: it is a URL or a frame of a video; the file is not there, too large, damaged or of another format,
            or has pixels without a defined range.
    """
    from PIL import Image

    data = _data(reference)
    if data[:4] == b"RIFF":  # whose decoder allocates the whole canvas before it says a size
        _check(_webp_size(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except Exception as error:  # a decoder on foreign bytes raises anything
        raise _damaged() from error
    with image:
        _check(image.size)
        tags: Any = getattr(image, "tag_v2", {})  # TIFF alone
        tile = [tags.get(name) for name in TILE]
        if all(isinstance(edge, int) for edge in tile) and tile[0] * tile[1] > MAX_PIXELS:
            raise _too_large()
        try:
            image.load()
        except Exception as error:  # as above
            raise _damaged() from error
        if image.mode in ("I", "F"):
            raise NotReadError(f"an image whose pixels have no defined range ({image.mode})")
        try:
            return _upright(_on_white(image), image)
        except (ValueError, OSError) as error:
            raise _damaged() from error


def _data(reference: str) -> bytes:
    """The encoded bytes."""
    if reference.startswith("frame:"):
        raise NotReadError("a frame of a video, which is not decoded")
    if reference.startswith("listed:") or reference.lower().startswith(("http://", "https://")):
        raise NotReadError("a URL, which is not fetched")
    if reference.startswith("data:"):
        head, _, body = reference.partition(",")
        try:
            data = base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
        except ValueError as error:
            raise _damaged() from error
    else:
        try:
            if not stat.S_ISREG(os.stat(reference).st_mode):  # a named pipe would be waited for
                raise NotReadError("what is not a file")
            with open(reference, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise NotReadError("a file that cannot be opened") from error
    if len(data) > MAX_BYTES:
        raise NotReadError(f"an image of more than {MAX_BYTES:,} bytes")
    return data


def _check(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_large()


def _too_large() -> NotReadError:
    return NotReadError(f"an image of more than {MAX_PIXELS:,} pixels")


def _damaged() -> NotReadError:
    return NotReadError(f"an image that is damaged or none of {', '.join(FORMATS)}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height (RFC 9649, 2.5 to 2.7); none of what is no WebP, or cut off, which its decoder refuses."""
    kind, head = data[12:16], data[:30].ljust(30, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return 0, 0


def _on_white(image: Any) -> Any:
    """A loaded image's pixels as RGB, transparent ones on white."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        pixels, mask = _from_16_bit(image)
    elif image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image.copy()
        key = image.info.get("transparency")
        if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
            # the colour of a PNG in 16 bits, whose pixels Pillow has cut to their upper 8
            image.info["transparency"] = tuple(value >> 8 for value in key)
        shown = image.convert("RGBA")
        pixels, mask = shown.convert("RGB"), shown.getchannel("A")
    else:
        pixels, mask = image, None
    if mask is not None:
        canvas = Image.new(pixels.mode, pixels.size, "white")
        canvas.paste(pixels, mask=mask)
        pixels = canvas
    made = pixels.convert("RGB")
    made = made.copy() if made is image else made
    made.info = {}
    return made


def _from_16_bit(image: Any) -> tuple[Any, Any]:
    """16-bit grey, or 12 bits of a TIFF, scaled to 8; and the mask of what is not transparent, if a grey is."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))
    top = (1 << bits[0]) - 1 if bits and bits[0] in (12, 16) else 65535
    table = [min(255, (value * 510 + top) // (2 * top)) for value in range(65536)]  # round(255 * value / top)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        table = [255 - value for value in table]
    wide, key = image.convert("I"), image.info.get("transparency")  # I takes a table of 65536 values
    mask = wide.point([0 if value == key else 255 for value in range(65536)], "L") if isinstance(key, int) else None
    return wide.point(table, "L"), mask


def _upright(pixels: Any, image: Any) -> Any:
    """Turned or mirrored as ``image``'s EXIF data say; what cannot be read of them says nothing."""
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_270,
        7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }  # fmt: skip
    try:
        said = turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF data are foreign bytes too
        said = None
    return pixels if said is None else pixels.transpose(said)
