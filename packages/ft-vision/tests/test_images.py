"""Real files, made by Pillow or byte by byte, one for each thing that an image file can be."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from ft_core.errors import FtError
from ft_vision import ImageError, read_image
from ft_vision.images import FORMATS

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Four plain quarters, red green / blue white, so that every turn shows and JPEG keeps the middle of each."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    w, h = size[0] // 2, size[1] // 2
    draw.rectangle((0, 0, w - 1, h - 1), RED)
    draw.rectangle((w, 0, size[0], h - 1), GREEN)
    draw.rectangle((0, h, w - 1, size[1]), BLUE)
    return image


def noise(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Pixels that don't compress, so that cutting a file in half cuts the picture."""
    return Image.frombytes("RGB", size, bytes((i * i * 31 + i * 7) % 251 for i in range(size[0] * size[1] * 3)))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, data: bytes = b"", extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(data)) if data else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + png_chunk(b"IEND", b"")


# -- formats and sources


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_picture(format: str) -> None:
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 95}}.get(format, {})
    image = read_image(encode(picture(), format, **options))
    assert type(image) is Image.Image
    assert (image.mode, image.size, image.info) == ("RGB", (40, 24), {})
    for spot, colour in (((8, 6), RED), ((32, 6), GREEN), ((8, 18), BLUE), ((32, 18), WHITE)):
        difference = max(abs(a - b) for a, b in zip(image.getpixel(spot), colour, strict=True))
        assert difference <= (3 if format == "jpeg" else 0)  # a plain block costs JPEG its colour rounding only


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(encode(noise()))
    expected = noise().tobytes()
    assert read_image(path).tobytes() == expected
    assert read_image(str(path)).tobytes() == expected
    assert read_image(path.read_bytes()).tobytes() == expected
    assert read_image(noise()).tobytes() == expected
    with Image.open(path) as opened:
        assert read_image(opened).tobytes() == expected
    with path.open("rb") as file:
        assert read_image(file).tobytes() == expected
        assert not file.closed


def test_a_pipe_without_seek_is_read() -> None:
    read, write = os.pipe()
    data = encode(picture())
    os.write(write, data)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert read_image(file).tobytes() == picture().tobytes()


def test_a_pil_image_is_left_as_it_is() -> None:
    given = Image.new("RGB", (2, 2), "red")
    given.info["note"] = "mine"
    result = read_image(given)
    result.putpixel((0, 0), BLUE)
    assert given.getpixel((0, 0)) == RED
    assert given.info == {"note": "mine"}


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "lies.png"
    path.write_bytes(encode(picture(), "BMP"))
    assert read_image(path).tobytes() == picture().tobytes()


def test_formats_can_be_restricted() -> None:
    with pytest.raises(ImageError, match=r"is a gif file; read are png, jpeg: convert it"):
        read_image(encode(picture(), "GIF"), formats=("png", "jpeg"))


def test_greyscale_on_request() -> None:
    image = read_image(encode(Image.new("RGB", (1, 1), (10, 200, 30))), mode="L")
    assert image.mode == "L"
    assert image.getpixel((0, 0)) == round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)


# -- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation(orientation: int, format: str) -> None:
    # Where the stored picture's corners (left top, right top, left bottom, right bottom) belong: EXIF 2.32, 4.6.4.
    corners = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    image = read_image(encode(picture(), format, exif=exif, **options))
    assert image.size == ((40, 24) if orientation < 5 else (24, 40))
    w, h = image.size
    spots = [(w // 4, h // 4), (3 * w // 4, h // 4), (w // 4, 3 * h // 4), (3 * w // 4, 3 * h // 4)]
    names = {(True, False, False): "r", (False, True, False): "g", (False, False, True): "b", (True, True, True): "w"}
    assert "".join(names[tuple(v > 128 for v in image.getpixel(spot))] for spot in spots) == corners


def test_the_orientation_of_a_pil_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encode(picture(), "PNG", exif=exif))) as opened:
        assert read_image(opened).size == (24, 40)


def test_unreadable_exif_counts_as_none() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert read_image(data).size == (40, 24)


# -- modes


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert read_image(encode(image)).tobytes() == bytes((*RED, *BLUE))
    assert read_image(encode(image, transparency=0)).tobytes() == bytes((*WHITE, *BLUE))
    half = read_image(encode(image, transparency=bytes((128, 255))))
    assert half.getpixel((0, 0)) == (255, 127, 127)  # 0.502 red + 0.498 white


@pytest.mark.parametrize("alpha", [0, 1, 127, 128, 254, 255])
def test_alpha_is_composited_on_white(alpha: int) -> None:
    rgba = read_image(encode(Image.new("RGBA", (1, 1), (10, 100, 200, alpha)))).getpixel((0, 0))
    grey = read_image(encode(Image.new("LA", (1, 1), (50, alpha)))).getpixel((0, 0))
    for found, stored in zip((*rgba, *grey), (10, 100, 200, 50, 50, 50), strict=True):
        assert abs(found - (stored * alpha + 255 * (255 - alpha)) / 255) <= 1


def test_a_transparent_colour_key() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert read_image(encode(image, transparency=RED)).tobytes() == bytes((*WHITE, *BLUE))


def test_premultiplied_alpha() -> None:
    image = Image.new("RGBA", (1, 1), (200, 0, 0, 128)).convert("RGBa")
    found = read_image(image).getpixel((0, 0))
    assert all(abs(a - b) <= 2 for a, b in zip(found, (227, 127, 127), strict=True))  # rounded twice
    grey = read_image(Image.new("LA", (1, 1), (200, 128)).convert("La")).getpixel((0, 0))
    assert all(abs(a - 227) <= 2 for a in grey)


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    for format in ("PNG", "TIFF", "BMP"):
        assert read_image(encode(image, format)).tobytes() == bytes((*BLACK, *WHITE))


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert read_image(encode(image, "TIFF")).getpixel((8, 8)) == RED
    found = read_image(encode(image, "JPEG", quality=95)).getpixel((8, 8))
    assert max(abs(a - b) for a, b in zip(found, RED, strict=True)) <= 3


SIXTEEN = [0, 128, 129, 255, 257, 1000, 32768, 65278, 65535]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_scaled(format: str) -> None:
    image = Image.frombytes("I;16", (len(SIXTEEN), 1), struct.pack(f"<{len(SIXTEEN)}H", *SIXTEEN))
    expected = [int(v * 255 / 65535 + 0.5) for v in SIXTEEN]
    assert list(read_image(encode(image, format), mode="L").tobytes()) == expected
    assert list(read_image(image, mode="L").tobytes()) == expected
    colour = read_image(encode(image, format))
    assert [colour.getpixel((x, 0)) for x in range(len(SIXTEEN))] == [(v, v, v) for v in expected]


def test_big_endian_16_bit_greyscale() -> None:
    image = Image.frombytes("I;16B", (len(SIXTEEN), 1), struct.pack(f">{len(SIXTEEN)}H", *SIXTEEN))
    data = encode(image, "TIFF")
    assert data.startswith(b"MM")
    assert list(read_image(data, mode="L").tobytes()) == [int(v * 255 / 65535 + 0.5) for v in SIXTEEN]


def test_16_bit_greyscale_with_white_as_zero() -> None:
    image = Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 257 * 100, 65535))
    assert list(read_image(encode(image, "TIFF", tiffinfo={262: 0}), mode="L").tobytes()) == [255, 155, 0]


def test_16_bit_greyscale_with_a_transparent_value() -> None:
    image = Image.frombytes("I;16", (3, 1), struct.pack("<3H", 1000, 1001, 65535))
    assert list(read_image(encode(image, transparency=1000), mode="L").tobytes()) == [255, 4, 255]


def test_16_bit_colour_with_a_transparent_colour() -> None:
    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0)
    key = png_chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    image = read_image(png(2, 1, depth=16, colour=2, data=row, extra=key))
    assert image.tobytes() == bytes((*WHITE, *RED))


def test_pixels_without_a_range_are_refused() -> None:
    with pytest.raises(ImageError, match="32-bit integer pixels"):
        read_image(encode(Image.new("I", (2, 2)), "TIFF"))
    with pytest.raises(ImageError, match="floating-point pixels"):
        read_image(Image.new("F", (2, 2)))


def test_lab() -> None:
    pytest.importorskip("PIL._imagingcms", reason="this Pillow lacks littlecms")
    image = Image.new("LAB", (1, 1), (117, 187, 176))  # L* 45.9, a* 59, b* 48
    for mode, expected in (("RGB", (200, 50, 30)), ("L", (93,))):
        found = read_image(encode(image, "TIFF"), mode=mode)  # type: ignore[arg-type]
        assert all(abs(a - b) <= 3 for a, b in zip(found.tobytes(), expected, strict=True))


def test_a_colour_profile_is_dropped() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = read_image(encode(picture(), icc_profile=profile))
    assert image.info == {}
    assert image.tobytes() == picture().tobytes()
    assert read_image(encode(picture(), icc_profile=b"no profile at all")).tobytes() == picture().tobytes()


# -- several frames


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert read_image(data).tobytes() == frames[0].tobytes()


def test_a_pil_image_is_read_at_its_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    with Image.open(io.BytesIO(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))) as opened:
        opened.seek(1)
        assert read_image(opened).tobytes() == frames[1].tobytes()


# -- what is refused


def line_of(source: object, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(format: str, kept: float, tmp_path: Path) -> None:
    data = encode(noise(), format, **({"lossless": True} if format == "webp" else {}))
    path = tmp_path / f"cut.{format}"
    path.write_bytes(data[: int(len(data) * kept)])
    assert f"cut.{format}: is a truncated or damaged {format} file" in line_of(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("format", FORMATS)
def test_a_header_alone(format: str) -> None:
    data = encode(noise(), format)
    for length in range(12, 30):
        line_of(data[:length])


def test_no_damage_gets_out_as_another_error() -> None:
    """Every file with eight bytes overwritten gives an image of the right mode or an ImageError, nothing else."""
    refused = 0
    for format in FORMATS:
        data = encode(noise((16, 16)), format)
        for start in range(4, min(len(data), 400), 3):
            for filler in (b"\xff" * 8, b"\0" * 8):
                damaged = data[:start] + filler + data[start + 8 :]
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
                        assert read_image(damaged, max_pixels=1 << 22).mode == "RGB"
                except ImageError:
                    refused += 1
    assert refused > 100


def test_a_bomb_is_refused_from_its_header() -> None:
    # 40000 x 40000 pixels and not one byte of them: only the header can have been looked at.
    line = line_of(png(40000, 40000, colour=2))
    assert line.startswith("image of 45 bytes: has 40000 x 40000 = 1,600,000,000 pixels, more than 67,108,864")


def test_a_webp_bomb_is_refused_before_its_canvas_is_allocated() -> None:
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (16383).to_bytes(3, "little") * 2
    data = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    assert "has 16384 x 16384 = 268,435,456 pixels" in line_of(data)


@pytest.mark.parametrize("lossless", [True, False])
def test_the_webp_header_is_read_right(lossless: bool) -> None:
    data = encode(Image.new("RGB", (123, 45)), "WEBP", lossless=lossless)
    assert "has 123 x 45 = 5,535 pixels" in line_of(data, max_pixels=5534)
    assert read_image(data, max_pixels=5535).size == (123, 45)


def test_a_tiff_with_a_giant_tile() -> None:
    fields = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 200, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0)
    assert "a tile: has 60000 x 60000" in line_of(data.ljust(300, b"\0"))


def test_limits_are_arguments_and_pillows_own_stay() -> None:
    before = Image.MAX_IMAGE_PIXELS
    data = encode(Image.new("1", (10000, 10000)))  # 100 million pixels: over Pillow's warning, under its error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "max_pixels" in line_of(data)
        assert read_image(data, mode="L", max_pixels=100_000_000).size == (10000, 10000)
    assert before == Image.MAX_IMAGE_PIXELS
    assert "larger than 100 bytes (max_bytes)" in line_of(data, max_bytes=100)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_zero_size(width: int, height: int) -> None:
    assert f"has no pixels ({width} x {height})" in line_of(png(width, height))
    assert "has no pixels" in line_of(Image.new("RGB", (width, height)))


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "none.png: cannot be read: No such file or directory" in line_of(tmp_path / "none.png")
    assert "is not a file" in line_of(tmp_path) or "Is a directory" in line_of(tmp_path)
    assert "cannot be read" in line_of("a\0b.png")
    (tmp_path / "empty.png").touch()
    assert line_of(tmp_path / "empty.png").endswith("empty.png: is empty")
    (tmp_path / "page.png").write_text("<html>not found</html>")
    assert "page.png: holds no image format that is known here; read are png, jpeg" in line_of(tmp_path / "page.png")
    assert "open it in binary mode" in line_of(io.StringIO("text"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png: is not a file" in line_of(tmp_path / "pipe.png")


def test_wrong_arguments() -> None:
    assert issubclass(ImageError, FtError)
    with pytest.raises(ValueError, match="mode is 'RGB' or 'L', not 'RGBA'"):
        read_image(picture(), mode="RGBA")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not heic"):
        read_image(picture(), formats=("png", "heic"))
    with pytest.raises(TypeError, match="not int"):
        read_image(3)  # type: ignore[arg-type]
