"""Videos: animations, files of several pages and lists of frames, each a few images of a row."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_core.config.load import check_config
from ft_core.data import FORMATS
from ft_core.errors import DataError
from ft_vision import read_image
from ft_vision.frames import frame_references, read_frame, spread, video_frames
from ft_vision.images import ImageError, frame_count, image_size, read_frames
from ft_vision.rows import image_name, normalise, open_reference

ANSWER = {"role": "assistant", "content": "1"}
PLACE = {"type": "image"}
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250)]


def animation(path: Path, form: str, count: int = 6, size: tuple[int, int] = (56, 56)) -> Path:
    first, *others = (Image.new("RGB", size, COLOURS[number % 6]) for number in range(count))
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    first.save(path, form, save_all=True, append_images=others, **options)
    return path


def normal(row: dict[str, Any], folder: Path | None, frames: int = 3, name: str = "messages") -> dict[str, Any]:
    values = {"model": "m", "task": "vision", "data": "none", "vision": {"video_frames": frames}}
    return normalise(row, FORMATS[name], folder, config=check_config(values))


def colours(row: dict[str, Any]) -> list[Any]:
    return [read_image(open_reference(image)).getpixel((5, 5)) for image in row["images"]]


@pytest.mark.parametrize(
    ("total", "most", "taken"), [(6, 3, [0, 2, 4]), (2, 8, [0, 1]), (7, 7, [*range(7)]), (5, 1, [0])]
)
def test_frames_are_taken_evenly(total: int, most: int, taken: list[int]) -> None:
    assert spread(total, most) == taken


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_is_its_frames(form: str, tmp_path: Path) -> None:
    path = str(animation(tmp_path / "a", form))
    assert frame_count(path) == 6
    assert [image.getpixel((5, 5)) for image in read_frames(path, [1, 4])] == [COLOURS[1], COLOURS[4]]
    references = frame_references(path, 3)
    assert references == [f"frame:{number}/3:{path}" for number in range(3)]
    for number, reference in enumerate(references):
        image = read_frame(reference)
        assert (image.mode, image.size, image.getpixel((5, 5))) == ("RGB", (56, 56), COLOURS[2 * number])
        assert image_size(open_reference(reference)) == (56, 56)
    assert image_name(references[1]) == f"frame 2 of 3 of {path}"
    # A file that was written anew is read anew.
    animation(Path(path), form, 3)
    assert read_frame(references[1]).getpixel((5, 5)) == COLOURS[1]


def test_every_way_to_give_a_video_is_the_same(tmp_path: Path) -> None:
    animation(tmp_path / "a.gif", "GIF")
    data = (tmp_path / "a.gif").read_bytes()
    single = [Image.new("RGB", (56, 56), colour) for colour in COLOURS]
    for number, image in enumerate(single):
        image.save(tmp_path / f"{number}.png")
    listed = [f"{number}.png" for number in range(6)]
    asked = {"role": "user", "content": [{"type": "video", "video": None}, {"type": "text", "text": "q"}]}
    word = {"role": "user", "content": "<video>\nq"}
    plain = {"role": "user", "content": "q"}
    ways: list[Any] = ["a.gif", str(tmp_path / "a.gif"), data, {"bytes": data}, {"path": "a.gif"}, listed, single]
    shown = [[{"type": "video", "video": given}, {"type": "text", "text": "q"}] for given in ways]
    rows: list[dict[str, Any]] = [
        *({"messages": [{"role": "user", "content": content}, ANSWER]} for content in shown),
        {"videos": ["a.gif"], "messages": [asked, ANSWER]},
        {"video": "a.gif", "messages": [word, ANSWER]},
        {"video": listed, "messages": [plain, ANSWER]},
        {"video": "a.gif", "conversations": [{"from": "human", "value": "<video>\nq"}, {"from": "gpt", "value": "1"}]},
    ]
    for row in rows:
        made = normal(row, tmp_path, name="sharegpt" if "conversations" in row else "messages")
        assert made["messages"] == [{"role": "user", "content": [PLACE] * 3 + [{"type": "text", "text": "q"}]}, ANSWER]
        assert colours(made) == COLOURS[::2], row
        assert normal(made, None) == made  # what a run keeps can be read again


def test_images_and_videos_keep_their_order(tmp_path: Path) -> None:
    animation(tmp_path / "a.gif", "GIF")
    Image.new("RGB", (56, 56), (9, 9, 9)).save(tmp_path / "x.png")
    row = {
        "images": ["x.png"],
        "videos": ["a.gif", ["x.png"]],
        "messages": [{"role": "user", "content": "<video> then <image> then <video>"}, ANSWER],
    }
    made = normal(row, tmp_path, frames=1)
    assert colours(made) == [COLOURS[0], (9, 9, 9), (9, 9, 9)]
    assert [part["type"] for part in made["messages"][0]["content"]] == ["image", "text"] * 2 + ["image"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"videos": "a", "messages": [ANSWER]}, "videos must be a list, not text"),
        ({"videos": ["a", "a"], "messages": [{"role": "user", "content": "<video>"}, ANSWER]}, "1 more videos than"),
        ({"videos": ["a"], "messages": [{"role": "user", "content": "<video><video>"}, ANSWER]}, "that is not given"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ANSWER]}, "that is not given"),
        ({"video": [], "messages": [{"role": "user", "content": "q"}, ANSWER]}, "has no frames"),
        ({"video": 3, "messages": [{"role": "user", "content": "q"}, ANSWER]}, "the row's video must be a path"),
        (
            {"video": "https://a.org/a.mp4", "messages": [{"role": "user", "content": "q"}, ANSWER]},
            "only images are fetched",
        ),
        ({"video": b"what", "messages": [{"role": "user", "content": "q"}, ANSWER]}, "no video that is known here"),
    ],
)
def test_what_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        normal(row, tmp_path)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("frame:0/400:/a.gif", "image 1 is one of 400 frames of /a.gif: vision.video_frames allows 3"),
        ("frame:0/3:a.gif", "image 1, frame:0/3:a.gif: is no reference to a frame, such as"),
        (
            "frame:3/3:/a.gif",
            "is no reference to a frame, such as frame:0/8:/folder/a.mp4; of a file of that name write",
        ),
        ("frame:-1/3:/a.gif", "is no reference"),
        ("frame:²/3:/a.gif", "is no reference"),
        (f"frame:0/{'9' * 5000}:/a.gif", "is no reference"),
        ("frame:x.png", "is no reference .* write ./frame:x.png"),
        ("frame:", "is no reference"),
    ],
)
def test_a_row_does_not_claim_any_frame(reference: str, message: str, tmp_path: Path) -> None:
    """The normal form is read again, and so is what a data set's text has of it."""
    user = {"role": "user", "content": "q"}
    shown = {"role": "user", "content": [{"type": "image", "image": reference}]}
    for row in ({"images": [reference], "messages": [user, ANSWER]}, {"messages": [shown, ANSWER]}):
        with pytest.raises(DataError, match=message) as raised:
            normal(row, tmp_path)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 300


def test_frames_of_a_normal_form_are_taken(tmp_path: Path) -> None:
    row = {"images": ["frame:1/3:/a:b.gif"], "messages": [{"role": "user", "content": [PLACE]}, ANSWER]}
    assert normal(row, tmp_path) == normal(row, None) == row
    row["images"] = ["frame:1/1024:/a.gif"]
    assert normalise(row, FORMATS["messages"], None) == row  # of any configuration, where none is told


def test_a_file_that_is_no_video_is_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#EXTM3U\n/etc/passwd\n")
    whole = animation(tmp_path / "a.gif", "GIF", 8).read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("gone.gif", "cannot be read: No such file"),
        ("text", "holds no video that is known here"),
        ("cut.gif", "truncated or damaged gif file"),
        (".", "is not a file"),
    ):
        references = frame_references(str(tmp_path / name), 8)
        assert references
        with pytest.raises(ImageError, match=message):
            read_frame(references[-1])
    pages = io.BytesIO()
    Image.new("L", (2, 2)).save(pages, "TIFF", save_all=True, append_images=[Image.new("L", (56, 56))])
    with pytest.raises(ImageError, match="frame 1: has 56 x 56"):
        list(read_frames(pages.getvalue(), [0, 1], max_pixels=100))


def test_a_run_sees_videos_and_counts_the_bad_ones(
    configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path
) -> None:
    animation(tmp_path / "a.webp", "WEBP")
    (tmp_path / "bad.gif").write_bytes(b"GIF89a")
    rows = [{"video": name, "question": "which?", "answer": "1"} for name in ("a.webp", "a.webp", "bad.gif")]
    vision = {"video_frames": 2, "on_bad_image": "skip"}
    made = ft("train", configure("llava", rows=rows, vision=vision, training={"max_steps": 1}))
    assert made.code == 0, made.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["data"]["images"], summary["data"]["bad_image_rows"]) == (4, 1)
    made = ft("train", configure("llava", rows=rows, vision={"video_frames": 2}), "--overwrite")
    assert made.code == 2
    assert f"row 3: {tmp_path / 'bad.gif'}: is a truncated or damaged gif file" in made.message


MP4 = b"\0\0\0\x20ftypisom" + bytes(20)


def test_without_pyav_a_file_of_video_says_what_to_install(
    configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(MP4)
    rows = [{"video": "a.mp4", "question": "which?", "answer": "1"}]
    made = ft("train", configure(rows=rows, vision={"on_bad_image": "skip"}))
    assert made.code == 2
    assert 'PyAV, which is not installed: pip install "ft-vision[video]"' in made.message


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov", "webm"])
def test_a_file_of_video_is_its_frames(suffix: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if suffix == "webm" else "mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), COLOURS[number % 6]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    references = frame_references(str(path), 4)
    assert len(references) == 4
    for number, reference in enumerate(references):
        # Of four of twelve frames, every third; the coding is lossy: 4:2:0 and a coarse quantizer.
        found, meant = read_frame(reference).getpixel((32, 32)), COLOURS[3 * number % 6]
        assert all(abs(a - b) < 40 for a, b in zip(found, meant, strict=True)), (number, found, meant)
    assert len(video_frames(path.read_bytes(), 100)) == 12
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ImageError, match=r"is a truncated or damaged file of video|has 0 frames|no frame of it"):
        video_frames(str(path), 4)


@pytest.mark.parametrize(("angle", "red"), [(0, (16, 32)), (90, (32, 48)), (180, (48, 32)), (-90, (32, 16))])
def test_a_video_is_shown_as_the_phone_was_held(angle: int, red: tuple[int, int], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    image = Image.new("RGB", (64, 64), "blue")
    image.paste("red", (0, 0, 32, 64))  # the left half, which a turn to the left brings down
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        if angle:
            stream.set_display_rotation(angle)
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    (frame,) = video_frames(str(tmp_path / "a.mp4"), 1)
    pixel: Any = frame.getpixel(red)
    assert pixel[0] > 150 > 100 > pixel[2], pixel


def test_a_broken_file_of_video_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ImageError, match="truncated or damaged file of video") as raised:
        video_frames(MP4, 4)
    assert "\n" not in str(raised.value)
