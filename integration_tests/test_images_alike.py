"""A proof of ft-export's reads images by its own code, and sees what a training sees by ft-vision's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_export import opening
from ft_export.opening import NotReadError, open_image
from ft_vision import ImageError, read_image
from ft_vision import images as trained

WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("RGB", "png", {}), ("RGBA", "png", {}), ("LA", "png", {}), ("L", "png", {}), ("P", "png", {}), ("1", "png", {}),
    ("P", "png", {"transparency": 3}), ("RGB", "png", {"transparency": (10, 20, 30)}),
    ("L", "png", {"transparency": 9}),
    ("I;16", "png", {}), ("I;16", "tiff", {}), ("CMYK", "tiff", {}), ("RGBA", "tiff", {}), ("RGB", "tiff", {}),
    ("RGB", "tiff", {"compression": "tiff_lzw"}), ("LAB", "tiff", {}), ("YCbCr", "tiff", {}), ("F", "tiff", {}),
    ("CMYK", "jpeg", {}), ("RGB", "jpeg", {}), ("L", "jpeg", {}), ("RGBA", "webp", {}), ("RGB", "webp", {}),
    ("RGBA", "webp", {"lossless": True}), ("P", "gif", {"transparency": 3}), ("RGB", "bmp", {}), ("1", "bmp", {}),
    ("RGB", "ppm", {}),
]  # fmt: skip


def noise(mode: str) -> Image.Image:
    """19 by 11 pixels of chance, in the top left one the value that some ways of saving make transparent."""
    chance = random.Random(mode)
    layer = {"1": "L", "LAB": "RGB", "YCbCr": "RGB"}.get(mode, mode)
    width = {"I;16": 2, "F": 4, "P": 1}.get(layer, len(layer))
    data = bytes(chance.randrange(64 if mode == "P" else 256) for _ in range(19 * 11 * width))
    image = Image.new("F", (19, 11), 0.5) if mode == "F" else Image.frombytes(layer, (19, 11), data)
    if mode == "P":
        image.putpalette([chance.randrange(256) for _ in range(768)])
        image.putpixel((0, 0), 3)
    if mode == "RGB":
        image.putpixel((0, 0), (10, 20, 30))
    if mode == "L":
        image.putpixel((0, 0), 9)
    if mode == "1":
        return image.convert("1")
    return Image.frombytes(mode, (19, 11), data) if layer != mode else image


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, (*way[:2], *way[2]))))
def test_a_proof_sees_what_a_training_sees(way: Any, orientation: int, tmp_path: Path) -> None:
    mode, kind, options = way
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = {"exif": exif} if kind in ("png", "jpeg", "webp", "tiff") else {}
    noise(mode).save(path, **options, **tagged)
    try:
        expected = read_image(path)
    except ImageError:
        assert mode == "F" or kind == "ppm"
        with pytest.raises(NotReadError):
            open_image(str(path))
        return
    read = open_image(str(path))
    assert (read.mode, read.size) == (expected.mode, expected.size)
    assert read.tobytes() == expected.tobytes()


def test_the_bounds_are_the_same() -> None:
    assert (opening.MAX_PIXELS, opening.MAX_BYTES) == (trained.MAX_PIXELS, trained.MAX_BYTES)
    assert {name.lower() for name in opening.FORMATS} == set(trained.FORMATS)
