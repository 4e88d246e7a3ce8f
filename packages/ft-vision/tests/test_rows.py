"""Rows with images in the forms that data sets have, and what is refused."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_core.data import FORMATS
from ft_core.errors import DataError
from ft_vision import read_image
from ft_vision.rows import normalise, open_reference

ANSWER = {"role": "assistant", "content": "1"}


def encoded(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(buffer, "PNG")
    return buffer.getvalue()


def asked(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


PLACE = {"type": "image"}
Q = text("q")


def test_a_path_is_looked_for_beside_the_data(tmp_path: Path) -> None:
    row = {"messages": [asked({"type": "image", "image": "a/b.png"}, text("which?")), ANSWER]}
    assert normalise(row, FORMATS["messages"], tmp_path) == {
        "messages": [{"role": "user", "content": [PLACE, text("which?")]}, ANSWER],
        "images": [str(tmp_path / "a" / "b.png")],
    }


def test_every_way_to_hold_an_image_is_the_same_image(tmp_path: Path) -> None:
    data = encoded()
    (tmp_path / "x.png").write_bytes(data)
    ways: list[Any] = [
        "x.png",
        str(tmp_path / "x.png"),
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": "x.png"},
        data,
        Image.open(io.BytesIO(data)),
    ]
    for way in ways:
        made = normalise({"messages": [asked({"type": "image", "image": way}), ANSWER]}, FORMATS["messages"], tmp_path)
        image = read_image(open_reference(made["images"][0]))
        assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0)), way


@pytest.mark.parametrize(
    ("row", "format", "content"),
    [
        # TRL's columns: images without a place stand before the first user's text
        ({"images": ["a", "b"], "messages": [{"role": "user", "content": "q"}, ANSWER]}, "messages", [PLACE, PLACE, Q]),
        ({"image": "a", "messages": [{"role": "user", "content": "q"}, ANSWER]}, "messages", [PLACE, Q]),
        ({"images": ["a"], "messages": [asked(Q, PLACE), ANSWER]}, "messages", [Q, PLACE]),
        ({"images": ["a"], "prompt": [asked(PLACE, Q)], "completion": [ANSWER]}, "prompt-completion", [PLACE, Q]),
        # LLaVA's
        (
            {"image": "a", "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "1"}]},
            "sharegpt",
            [PLACE, Q],
        ),
        # OpenAI's
        ({"messages": [asked(Q, {"type": "image_url", "image_url": {"url": "a"}}), ANSWER]}, "messages", [Q, PLACE]),
        # no image at all
        ({"messages": [asked(Q), ANSWER]}, "messages", "q"),
    ],
)  # fmt: skip
def test_the_forms_of_others(row: dict[str, Any], format: str, content: Any, tmp_path: Path) -> None:
    made = normalise(row, FORMATS[format], tmp_path)
    assert made["messages"] == [{"role": "user", "content": content}, ANSWER]
    places = content.count(PLACE) if isinstance(content, list) else 0
    assert made["images"] == [str(tmp_path / name) for name in ("a", "b")[:places]]


def test_several_turns_keep_their_images_and_words(tmp_path: Path) -> None:
    row = {
        "images": ["a", "b", "c"],
        "messages": [
            {"role": "system", "content": "look"},
            {"role": "user", "content": "<image> or <image>?"},
            ANSWER,
            {"role": "user", "content": "and <image>"},
            {"role": "assistant", "content": "2", "weight": 0},
            {"role": "user", "content": "why"},
            ANSWER,
        ],
    }
    made = normalise(row, FORMATS["messages"], tmp_path)
    assert made["messages"][1]["content"] == [PLACE, text(" or "), PLACE, text("?")]
    assert made["messages"][3]["content"] == [text("and "), PLACE]
    assert made["messages"][4]["weight"] == 0
    assert made["messages"][5]["content"] == "why"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [asked(PLACE), ANSWER]}, "has 0 images for 1 places"),
        ({"images": ["a", "b"], "messages": [asked(PLACE), ANSWER]}, "has 2 images for 1 places"),
        ({"images": ["a"], "messages": [asked({"type": "image", "image": "b"}), ANSWER]}, "keep one of the two"),
        ({"images": "a", "messages": [asked(PLACE), ANSWER]}, "images must be a list, not text"),
        ({"messages": [asked({"type": "image", "image": "https://x.org/a.png"}), ANSWER]}, "nothing is downloaded"),
        ({"messages": [asked({"type": "image", "image": 3}), ANSWER]}, "must be a path, a data: URL"),
        (
            {"images": ["~nosuchuser/x.png"], "messages": [asked(PLACE), ANSWER]},
            "image 1 is ~nosuchuser/x.png, of a user whom this machine does not know",
        ),
        (
            {"images": ["file://host/x.png"], "messages": [asked(PLACE), ANSWER]},
            "image 1 is file://host/x.png, a file of the host host: write file:///folder/a.png",
        ),
        ({"images": ["ftp://host/x.png"], "messages": [asked(PLACE), ANSWER]}, "of a kind that is not read"),
        ({"messages": [asked({"type": "image", "image": "data:image/png,abc"}), ANSWER]}, "without base64"),
        ({"messages": [asked({"type": "image", "image": "data:image/png;base64,a?"}), ANSWER]}, "is no base64"),
        ({"messages": [asked({"type": "audio", "audio": "a"}), ANSWER]}, "a part of type 'audio'"),
        ({"messages": [asked(text("\ufdd0")), ANSWER]}, r"U\+FDD0"),
        ({"messages": [{"role": "user", "content": "\ufdd1"}, ANSWER]}, r"U\+FDD1"),
        (
            {"messages": [asked(text("q")), {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
            "only text is learnt",
        ),
        ({"images": ["a"], "messages": [{"role": "system", "content": "s"}, ANSWER]}, "no user's turn"),
    ],
)
def test_what_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        normalise(row, FORMATS["messages"], tmp_path)


def test_strings_are_no_conversation(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no conversation"):
        normalise({"prompt": "a", "completion": "b"}, FORMATS["prompt-completion"], tmp_path)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/b%20c%C3%A4%25.png", "/a/b cä%.png"),
        ("file://localhost/a.png", "/a.png"),
        ("FILE:///~a/b#1?.png", "/~a/b#1?.png"),
    ],
)
def test_a_file_url_is_a_path(url: str, path: str, tmp_path: Path) -> None:
    made = normalise({"images": [url], "messages": [asked(PLACE), ANSWER]}, FORMATS["messages"], tmp_path)
    assert made["images"] == [path]


def test_a_relative_path_needs_a_file() -> None:
    with pytest.raises(DataError, match="relative path"):
        normalise({"images": ["a"], "messages": [asked(PLACE), ANSWER]}, FORMATS["messages"], None)
