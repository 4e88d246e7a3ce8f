"""Images of held-out rows: seen as a training sees them, and refused as there."""

from __future__ import annotations

import base64
import io
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="models that see are proven on images: pip install pillow")

from PIL import Image

from ft_export.opening import MAX_PIXELS, NotReadError, open_image
from ft_export.seeing import images_of, told

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves() -> Any:
    """Wide, red on the left, blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG of this size, with hardly any pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x00\x00\x00\x00") + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("orientation", "size", "first", "last"),
    [
        (1, (40, 20), RED, BLUE),
        (2, (40, 20), BLUE, RED),
        (3, (40, 20), BLUE, RED),
        (6, (20, 40), RED, BLUE),
        (8, (20, 40), BLUE, RED),
    ],
)
def test_images_stand_upright(orientation: int, size: tuple[int, int], first: Any, last: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves().save(tmp_path / "a.png", exif=exif)
    image = open_image(str(tmp_path / "a.png"))
    assert image.size == size
    assert (image.getpixel((0, 0)), image.getpixel((size[0] - 1, size[1] - 1))) == (first, last)
    assert images_of({"images": [str(tmp_path / "a.png")]})[0].image.size == size


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    clear = {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0}[mode]
    image = Image.new(mode, (4, 4), clear)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 1), {"RGBA": (10, 20, 30, 255), "LA": (10, 255), "P": 1}[mode])
    image.save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    read = open_image(str(tmp_path / "a.png"))
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((1, 1)) == ((10, 10, 10) if mode == "LA" else (10, 20, 30))


def test_cmyk_and_16_bits_are_scaled(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert open_image(str(tmp_path / "a.tif")).getpixel((0, 0)) == RED
    Image.new("I;16", (4, 4), 32896).save(tmp_path / "a.png")
    assert open_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (128, 128, 128)


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path, monkeypatch: Any) -> None:
    def never(self: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", never, raising=False)
    canvas = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (15999).to_bytes(3, "little") * 2
    side = 8193  # the next square beyond the bound
    for data in (header(12000, 12000), header(20000, 20000), header(side, side), canvas):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(NotReadError, match=f"more than {MAX_PIXELS:,} pixels"):
            open_image(str(tmp_path / "a.png"))


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.png")
    buffer = io.BytesIO()
    halves().save(buffer, "PNG")
    inside = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[:60])
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    os.mkfifo(tmp_path / "pipe")
    others = {
        "https://example.invalid/a.png": "a URL, which is not fetched",
        "listed:http://example.invalid/a.png": "a URL, which is not fetched",
        f"frame:0/2:{tmp_path}/a.png": "a frame of a video, which is not decoded",
        str(tmp_path / "gone.png"): "a file that cannot be opened",
        str(tmp_path / "half.png"): "an image that is damaged or none of PNG, JPEG, WEBP, GIF, BMP, TIFF",
        "data:image/png,abc": "an image that is damaged or none of PNG, JPEG, WEBP, GIF, BMP, TIFF",
        str(tmp_path / "f.tif"): "an image whose pixels have no defined range (F)",
        str(tmp_path / "pipe"): "what is not a file",
    }
    found = images_of({"images": [str(tmp_path / "a.png"), inside, *others]})
    assert [one.drawn for one in found] == ["", "", *others.values()]
    assert found[0].image.tobytes() == found[1].image.tobytes() == halves().tobytes()
    assert told(one.drawn for one in found[:5]) == (
        "2 of the rows' own, 3 drawn (2 for a URL, which is not fetched; 1 for a frame of a video, which is not "
        "decoded)"
    )
    assert told(["", ""]) == "2 of the rows' own, none drawn"
    assert [one.drawn for one in images_of({"text": "a"})] == ["a row without images"]
