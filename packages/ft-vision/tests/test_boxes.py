"""Boxes follow the image through the processor's own resizing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from ft_vision.boxes import CONVENTIONS, from_model, read_boxes, seen_size, to_model, write_boxes


@pytest.fixture
def processor() -> Any:
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 200 * 200})


def as_seen(processor: Any, image: Image.Image) -> torch.Tensor:
    """The image that the patches hold, ``[3, height, width]``."""
    made = processor([image], return_tensors="pt")
    time, rows, columns = made["image_grid_thw"][0].tolist()
    merge, patch = processor.merge_size, processor.patch_size
    parts = made["pixel_values"].reshape(
        time, rows // merge, columns // merge, merge, merge, 3, processor.temporal_patch_size, patch, patch
    )
    # time, row, column, row and column in the merged block, channel, frame, row and column in the patch
    seen = parts[0].permute(4, 0, 2, 6, 1, 3, 7, 5)
    return seen.reshape(3, rows * patch, columns * patch, -1)[..., 0]


@pytest.mark.parametrize("size", [(400, 300), (90, 160), (333, 77), (56, 56)])
def test_a_box_is_where_the_model_sees_it(size: tuple[int, int], processor: Any) -> None:
    width, height = size
    box = (width * 0.25, height * 0.4, width * 0.75, height * 0.9)
    image = Image.new("RGB", size, "black")
    left, top, right, bottom = (round(edge) for edge in box)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    pixels = as_seen(processor, image).mean(0)
    assert (pixels.shape[1], pixels.shape[0]) == seen_size(processor, size)
    bright = pixels > (pixels.min() + pixels.max()) / 2
    rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    (written,) = to_model([(left, top, right, bottom)], size, CONVENTIONS["qwen2_5_vl"], processor)
    # An edge between two pixels, resized: half of one to either side, and the rounding to a whole number.
    assert all(abs(int(a) - b) <= 1 for a, b in zip(found, written, strict=True)), (found, written)
    for convention in ("seen-pixels", "thousandths"):
        (made,) = to_model([box], size, convention, processor)
        (back,) = from_model([made], size, convention, processor)
        seen = seen_size(processor, size) if convention == "seen-pixels" else (1000, 1000)
        unit = max(width / seen[0], height / seen[1])
        assert all(abs(a - b) <= 0.5 * unit + 1e-9 for a, b in zip(back, box, strict=True))


def test_thousandths_need_no_processor() -> None:
    assert to_model([(0, 0, 640, 480), (64, 48, 320, 240)], (640, 480), CONVENTIONS["qwen3_vl"]) == [
        (0, 0, 1000, 1000),
        (100, 100, 500, 500),
    ]
    (back,) = from_model([(-5, 100, 1200, 500)], (640, 480), "thousandths")
    assert back == pytest.approx((0.0, 48.0, 640.0, 240.0))


def test_an_answer_is_read_as_it_was_written() -> None:
    answer = write_boxes([(1, 2, 3, 4), (5, 6, 7, 8)], ["a [cat]", "Hund ä"])
    assert answer == '[{"bbox_2d": [1, 2, 3, 4], "label": "a [cat]"}, {"bbox_2d": [5, 6, 7, 8], "label": "Hund ä"}]'
    expected = [([1.0, 2.0, 3.0, 4.0], "a [cat]"), ([5.0, 6.0, 7.0, 8.0], "Hund ä")]
    assert read_boxes(answer) == read_boxes(f"```json\n{answer}\n```") == expected
    assert read_boxes("none: []") == []
    for around in (
        "[The cat] is at {}",
        "as asked [1, 2]: {} [done]",
        "[ {} ...",
        "first [], then {}",
        "[" * 5000 + "{}",
    ):
        assert read_boxes(around.replace("{}", answer)) == expected, around[:20]


@pytest.mark.parametrize(
    "answer",
    ["a cat", "[1, 2]", '[{"bbox_2d": []}]', "[", '[{"bbox_2d": [1, 2, 3]}]', '[{"bbox_2d": [1, 2', '[{"label": "a"}]'],
)
def test_an_answer_without_boxes_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="holds no list of boxes"):
        read_boxes(answer)


def test_what_is_no_box_of_the_image_is_refused(processor: Any) -> None:
    for box in ((10, 10, 5, 20), (0, 0, 700, 10), (-1, 0, 5, 5)):
        with pytest.raises(ValueError, match="is none of an image of 640 x 480 pixels"):
            to_model([box], (640, 480), "thousandths")
    with pytest.raises(ValueError, match="need the model's processor"):
        to_model([(0, 0, 5, 5)], (640, 480), "seen-pixels")
    from transformers import CLIPImageProcessorPil

    with pytest.raises(ValueError, match="does not keep an image's shape"):
        seen_size(CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}), (64, 64))
