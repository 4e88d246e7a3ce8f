"""Boxes in answers, for grounding: from pixels of an image to the numbers that a family writes, and back.

An answer is text, and what its numbers count is the family's own convention. Qwen2.5-VL's are pixels of the image as it
was resized for the model (arXiv:2502.13923), so that they change with the pixel budget; Qwen3-VL's are
thousandths of the width and the height (arXiv:2511.21631). The other families were not taught any here: a
model that is trained with one of these two learns it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from PIL import Image

__all__ = ["CONVENTIONS", "Box", "Convention", "from_model", "read_boxes", "seen_size", "to_model", "write_boxes"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, from the image's upper left corner."""

Convention = Literal["seen-pixels", "thousandths"]

CONVENTIONS: dict[str, Convention] = {"qwen2_5_vl": "seen-pixels", "qwen3_vl": "thousandths"}
"""What the numbers of a family count, by ``model_type``."""


def seen_size(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height to which a processor resizes an image of this width and height.

    Args:
        processor: one of Qwen's, with the pixel budget that the model is trained with (``vision.max_pixels``); it is
            saved with the adapter.
        size: of the upright image, as :func:`ft_vision.read_image` gives it.

    Raises:
        ValueError: its images have no size of their own, or it refuses the shape.
    """
    images = getattr(processor, "image_processor", processor)
    made = images([Image.new("RGB", size)], return_tensors="np")
    if "image_grid_thw" not in made:
        raise ValueError(f"{type(images).__name__} does not keep an image's shape: take the convention 'thousandths'")
    _, rows, columns = (int(number) for number in made["image_grid_thw"][0])
    return columns * images.patch_size, rows * images.patch_size


def to_model(
    boxes: Iterable[Box], size: tuple[int, int], convention: Convention, processor: Any = None
) -> list[tuple[int, int, int, int]]:
    """Boxes in pixels of an image as the whole numbers that a model writes.

    Args:
        boxes: left, top, right, bottom in pixels of the upright image. COCO's are left, top, width and height: give
            ``(x, y, x + w, y + h)``.
        size: the image's width and height.
        convention: what the numbers count (:data:`CONVENTIONS`).
        processor: the model's, for ``seen-pixels``.

    Raises:
        ValueError: a box is none of this image, or ``seen-pixels`` without a processor.
    """
    across, down = _units(size, convention, processor)
    made = []
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left <= right <= size[0] and 0 <= top <= bottom <= size[1]):
            raise ValueError(
                f"the box {tuple(box)} is none of an image of {size[0]} x {size[1]} pixels: left, top, right, bottom"
            )
        xs = [round(x * across / size[0]) for x in (left, right)]
        ys = [round(y * down / size[1]) for y in (top, bottom)]
        made.append((xs[0], ys[0], xs[1], ys[1]))
    return made


def from_model(
    boxes: Iterable[Sequence[float]], size: tuple[int, int], convention: Convention, processor: Any = None
) -> list[Box]:
    """Boxes that a model wrote, in pixels of the image; what goes beyond the image is cut off.

    Args and errors are those of :func:`to_model`; the model's boxes may be any.
    """
    across, down = _units(size, convention, processor)

    def pixels(value: float, most: int, units: int) -> float:
        return min(max(value * most / units, 0.0), float(most))

    width, height = size
    return [
        (
            pixels(x1, width, across),
            pixels(y1, height, down),
            pixels(x2, width, across),
            pixels(y2, height, down),
        )
        for x1, y1, x2, y2 in boxes
    ]


def write_boxes(boxes: Iterable[Sequence[int]], labels: Iterable[str]) -> str:
    """Boxes as an answer, in the JSON that Qwen's models write: ``[{"bbox_2d": [x1, y1, x2, y2], "label": …}]``."""
    found = [{"bbox_2d": list(box), "label": label} for box, label in zip(boxes, labels, strict=True)]
    return json.dumps(found, ensure_ascii=False)


def read_boxes(answer: str) -> list[tuple[list[float], str]]:
    """The boxes of an answer as :func:`write_boxes` makes it, each with its label, whatever stands around the list.

    Of several lists it is the first that is not empty.

    Raises:
        ValueError: there is no such list in it.
    """
    decoder, at, empty, why = json.JSONDecoder(), answer.find("["), False, "no list of boxes of four numbers"
    while at >= 0:
        end = at + 1
        try:
            read, end = decoder.raw_decode(answer, at)
            boxes = [_box(one) for one in read]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f"no list of boxes: {error}"
        else:
            if boxes:
                return boxes
            empty = True
        at = answer.find("[", end)  # past a list that was read: what is in it is no answer of its own
    if not empty:
        raise ValueError(f"the answer holds {why}")
    return []


def _box(one: Any) -> tuple[list[float], str]:
    numbers = [float(number) for number in one["bbox_2d"]]
    if len(numbers) != 4:
        raise ValueError(f"{len(numbers)} numbers are no box")
    return numbers, str(one.get("label", ""))


def _units(size: tuple[int, int], convention: Convention, processor: Any) -> tuple[int, int]:
    """How many of a convention's units the image is, across and down."""
    if convention == "thousandths":
        return 1000, 1000
    if processor is None:
        raise ValueError("seen-pixels need the model's processor, which says to what size it resizes the image")
    return seen_size(processor, size)
