"""Any of Pillow's pixel layouts as 8-bit RGB or greyscale, and the rotation that EXIF asks for."""

from __future__ import annotations

from typing import Any, Literal

from PIL import Image

__all__ = ["is_turned", "to_8_bit", "upright"]

_ORIENTATION = 0x0112  # EXIF 2.32, table 4; the same tag as TIFF's
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_8_bit(image: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    """The pixels of a loaded image as ``mode``, transparency composited on white, without metadata.

    Raises:
        ValueError: Pillow has no conversion from the image's mode (LAB where Pillow lacks littlecms, say).
    """
    if image.mode.startswith("I;16"):
        opaque, mask = _from_16_bit(image)
    elif image.has_transparency_data:
        with_alpha = _with_alpha(image)
        opaque, mask = with_alpha.convert("RGB"), with_alpha.getchannel("A")
    else:
        opaque, mask = image, None
    if mask is not None:
        canvas = Image.new(opaque.mode, opaque.size, "white")
        canvas.paste(opaque, mask=mask)
        opaque = canvas
    if mode == "L" and opaque.mode in ("CMYK", "HSV", "LAB", "YCbCr"):
        opaque = opaque.convert("RGB")  # one definition of luma for all; LAB has no direct way to L at all
    converted = opaque.convert(mode)
    plain = converted.copy() if converted is image else converted
    plain.info = {}
    return plain


def upright(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """``pixels`` turned or mirrored as the EXIF data of ``image`` say."""
    turn = _TURNS.get(_orientation(image))
    return pixels if turn is None else pixels.transpose(turn)


def is_turned(image: Image.Image) -> bool:
    """Whether the EXIF data of ``image`` say that width and height change places."""
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF data are foreign bytes too; what cannot be read says nothing
        return 1


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # The transparent colour of a 16-bit PNG, whose pixels Pillow has cut to their upper 8 bits.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image.convert("RGBA")


def _from_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit greyscale, and the mask of opaque pixels if a grey value is declared transparent (PNG's tRNS)."""
    tags = getattr(image, "tag_v2", {})  # TIFF alone
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    top = (1 << bits[0]) - 1 if bits and bits[0] in (12, 16) else 65535
    values = [min(255, (value * 510 + top) // (2 * top)) for value in range(65536)]  # round(255 * value / top)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = [255 - value for value in values]
    wide = image.convert("I")  # the mode that takes a table of 65536 entries
    key = image.info.get("transparency")
    mask = None
    if isinstance(key, int):
        mask = wide.point([0 if value == key else 255 for value in range(65536)], "L")
    return wide.point(values, "L"), mask
