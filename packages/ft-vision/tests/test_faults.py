"""Every kind of odd or bad image through `ft train`: trained on, or its line and exit 2, or skipped and counted."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Make = Callable[[Path], None]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (60, 50)) -> Image.Image:
    return Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3))


def header_of_png(width: int, height: int) -> bytes:
    """A whole PNG file as far as its header says, of so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


GOOD: dict[str, bytes] = {
    "animated.gif": encoded(
        Image.new("P", (60, 50)), "GIF", save_all=True, append_images=[Image.new("P", (60, 50), 3)]
    ),
    "animated.webp": encoded(noise(), "WEBP", save_all=True, append_images=[noise()]),
    "cmyk.jpg": encoded(noise().convert("CMYK"), "JPEG"),
    "palette.png": encoded(noise().convert("P"), "PNG"),
    "transparent-palette.png": encoded(noise().convert("P"), "PNG", transparency=0),
    "turned.jpg": encoded(noise(), "JPEG", exif=turned()),
    "alpha.png": encoded(noise().convert("RGBA"), "PNG"),
    "one-bit.png": encoded(noise().convert("1"), "PNG"),
    "sixteen-bit.png": encoded(Image.new("I;16", (60, 50), 40000), "PNG"),
    "pixel.png": encoded(noise((1, 1)), "PNG"),
    "line.png": encoded(noise((100, 1)), "PNG"),
    "wrong-name.jpg": encoded(noise(), "PNG"),
    "pages.tif": encoded(noise(), "TIFF", save_all=True, append_images=[noise()]),
}
"""Images that are odd, and are read."""

BAD: dict[str, tuple[bytes, str]] = {
    "truncated.png": (encoded(noise(), "PNG")[:2000], "is a truncated or damaged png file"),
    "truncated.jpg": (encoded(noise(), "JPEG")[:900], "is a truncated or damaged jpeg file"),
    "truncated.webp": (encoded(noise(), "WEBP", lossless=True)[:900], "is a truncated or damaged webp file"),
    "no-header.png": (b"\x89PNG\r\n\x1a\n", "is a truncated or damaged png file"),
    "empty.png": (b"", "is empty"),
    "text.png": (b"not an image at all", "holds no image format that is known here"),
    "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "holds no image format that is known here"),
    "no-pixels.gif": (b"GIF89a\0\0\0\0\0\0\0;", "has no pixels (0 x 0)|is a truncated or damaged gif file"),
    "huge.png": (header_of_png(60_000, 60_000), "has 60000 x 60000 = 3,600,000,000 pixels, more than 67,108,864"),
    "bomb.png": (header_of_png(10_000, 10_000), "has 10000 x 10000 = 100,000,000 pixels, more than 67,108,864"),
    "lies.png": (header_of_png(500, 500), "is a truncated or damaged png file"),
    "floats.tif": (encoded(Image.new("F", (60, 50)), "TIFF"), "has floating-point pixels"),
}
"""Files that are no image, and what is said of them."""


def row_of(name: str) -> dict[str, Any]:
    return {"image": name, "question": "which?", "answer": "1"}


def write_all(folder: Path) -> None:
    for name, data in GOOD.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    Image.new("L", (2, 700)).save(folder / "thin.png")


ELSEWHERE = {
    "gone.png": "cannot be read: No such file or directory",
    "folder": "is not a file|Is a directory",
    "pipe": "is not a file",
}
"""Paths that lead to no image file."""


def says(message: str, expected: str) -> bool:
    return any(one in message for one in expected.split("|"))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_odd_images_are_trained_on_and_bad_ones_skipped_and_counted(
    name: str, configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path
) -> None:
    write_all(tmp_path)
    wrong = [*BAD, *ELSEWHERE, *(["thin.png"] if name == "qwen3_vl" else [])]  # Gemma sees every shape at one size
    rows = [row_of(each) for each in (*GOOD, *wrong)]
    vision = {"on_bad_image": "skip"}
    made = ft("train", configure(name, rows=rows, vision=vision, max_length=512, training={"max_steps": 2}))
    assert made.code == 0, made.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["images"] == len(GOOD)
    assert summary["data"]["bad_image_rows"] == len(wrong)
    assert f"left out: {len(wrong)} train rows in all with an image that cannot be used" in made.out + made.err


def test_each_bad_image_has_its_line(configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path) -> None:
    """What a header shows is said before the first step, what is damaged inside at the latest in its batch."""
    write_all(tmp_path)
    expected = {
        **{name: message for name, (_, message) in BAD.items()},
        **ELSEWHERE,
        "thin.png": "has 2 x 700 pixels, which the model cannot see",
    }
    for name, message in expected.items():
        made = ft("train", configure(rows=[row_of(name)], max_length=512, training={"max_steps": 1}), "--overwrite")
        assert made.code == 2, name
        assert f"{tmp_path / name}" in made.message, made.message
        assert says(made.message, message), made.message
        assert "Traceback" not in made.err
        if "(mend it, and go on" not in made.message:
            assert "row 1: " in made.message
            assert made.message.endswith("(vision.on_bad_image: skip leaves such rows out)")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "line 2: image 1 must be a path, a data: URL, or an object with 'bytes' or 'path', not a int"),
        ("", "line 2: image 1 must be a path"),
        ({"path": None}, "line 2: image 1 must be a path"),
        ("data:image/png;base64,%%%", "line 2: image 1 is no base64"),
        ("data:image/png,abc", "line 2: image 1 is a data: URL without base64"),
        ("data:image/png;base64,aGVsbG8=", "row 2: image of 5 bytes: holds no image format that is known here"),
        ("ftp://example.org/a.png", "line 2: image 1 is a URL, ftp://example.org/a.png, of a kind that is not read"),
        ("a\0b.png", "a\\x00b.png: cannot be read: |a\0b.png: cannot be read: "),
    ],
)
def test_what_is_given_instead_of_an_image(
    image: Any, message: str, configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path
) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "good.png")
    rows = [row_of("good.png"), {**row_of(""), "image": image}]
    made = ft("train", configure(rows=rows, training={"max_steps": 1}))
    assert made.code == 2
    assert says(made.message, message), made.message
