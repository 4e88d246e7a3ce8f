"""Rows of preference and prompts with images: every way to write one is read to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ft_core.data import FORMATS
from ft_core.errors import DataError
from ft_vision.rows import normalise

ASK = {"type": "text", "text": "which?"}
PARTS = [{"type": "image"}, ASK]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
WANTED = {
    "prompt": [{"role": "user", "content": PARTS}],
    "chosen": YES,
    "rejected": NO,
    "images": ["/data/a.png"],
}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


IMAGE = {"type": "image", "image": "a.png"}
PAIR = {"chosen": YES, "rejected": NO}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user(IMAGE, ASK)], **PAIR},
        {"prompt": [user(*PARTS)], "images": ["a.png"], **PAIR},
        {"prompt": [{"role": "user", "content": "which?"}], "images": ["a.png"], **PAIR},  # as TRL has them
        {"prompt": "which?", "image": "a.png", "chosen": "yes", "rejected": "no"},
        {"prompt": "<image>\nwhich?", "images": ["a.png"], **PAIR},
        {"chosen": [user(IMAGE, ASK), *YES], "rejected": [user(IMAGE, ASK), *NO]},
        {"prompt": [user(IMAGE, ASK)], "chosen": [user(IMAGE, ASK), *YES], "rejected": [user(IMAGE, ASK), *NO]},
        WANTED,
    ],
)
def test_pairs(row: dict[str, Any]) -> None:
    assert normalise(row, FORMATS["preference"], Path("/data")) == WANTED


def test_a_pair_of_text_alone() -> None:
    made = normalise({"prompt": "which?", **PAIR}, FORMATS["preference"], None)
    assert made == {"prompt": [{"role": "user", "content": "which?"}], **PAIR, "images": []}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user(IMAGE, ASK)], "answer": "7", "messages": ["whatever"]},
        {"prompt": "which?", "image": "a.png", "answer": "7", "messages": ["whatever"]},
    ],
)
def test_prompts_keep_their_columns(row: dict[str, Any]) -> None:
    made = normalise(row, FORMATS["prompt"], Path("/data"))
    assert made == {
        "prompt": [{"role": "user", "content": PARTS}],
        "answer": "7",
        "messages": ["whatever"],
        "images": ["/data/a.png"],
    }
    assert normalise(made, FORMATS["prompt"], None) == made


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [user(IMAGE, ASK)], "images": ["a.png"], **PAIR}, "in its messages and in a column too"),
        ({"prompt": [user(*PARTS)], **PAIR}, "has 0 images for 1 places"),
        ({"prompt": [user(*PARTS)], "images": ["a", "b"], **PAIR}, "has 2 images for 1 places"),
        (
            {"chosen": [user(IMAGE), *YES], "rejected": [user({"type": "image", "image": "b.png"}), *NO]},
            "shows other images in chosen than in rejected",
        ),
        (
            {"prompt": [user(ASK)], "chosen": [{"role": "assistant", "content": [IMAGE]}], "rejected": NO},
            "chosen is an answer with an image: only text is learnt",
        ),
        ({"prompt": "", "image": "a.png", **PAIR}, "holds no prompt"),
        ({"prompt": [user({"type": "audio"})], **PAIR}, "prompt[0]'s content has a part of type 'audio'"),
    ],
)
def test_what_is_no_pair_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        normalise(row, FORMATS["preference"], Path("/data"))
    assert message in str(caught.value)


def test_urls_and_videos_are_asked_about_as_the_configuration_says(tmp_path: Path) -> None:
    import json

    from PIL import Image

    from ft_core.config.load import check_config
    from ft_core.data import read_rows
    from ft_core.training.modality import of_modality

    Image.new("RGB", (9, 9)).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")] * 3
    )
    url, video = "https://example.org/a.png", str(tmp_path / "a.gif")
    place = {"type": "image"}
    rows = [
        {"image": url, "prompt": "q", "chosen": "1", "rejected": "2"},
        {"video": video, "prompt": "<video>q", "chosen": "1", "rejected": "2"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vision = {"allow_urls": True, "video_frames": 2}
    config = check_config({"model": "m", "task": "vision", "data": "none", "vision": vision})
    form = of_modality(config, "rows")
    one, other = read_rows(str(tmp_path / "rows.jsonl"), ("preference",), seed=0, form=form)
    assert one["images"] == [url]
    assert other["images"] == [f"frame:{number}/2:{video}" for number in range(2)]
    assert other["prompt"][0]["content"] == [place, place, {"type": "text", "text": "q"}]
