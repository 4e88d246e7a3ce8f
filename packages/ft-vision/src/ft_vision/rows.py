"""Rows of conversations with images, in one normal form.

``{"messages": [{"role", "content"}], "images": [reference, …]}``: a content is a string or, where there are images, a
list of ``{"type": "image"}`` and ``{"type": "text", "text": …}``; the references are those of the images in their
order: an absolute path, a ``data:`` URL with the encoded image in base64, the URL of an image that may be fetched, or a
frame of a video (:mod:`ft_vision.frames`). Text is read and checked as ft_core reads it.
A row of which several answers are accepted lists them as ``answers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.data import Format
from ft_core.errors import DataError
from ft_vision.references import image_name, kind_of, open_reference, reference_of, said_of
from ft_vision.seen import SEEN, Seen, flat

if TYPE_CHECKING:
    from ft_core.config import TrainConfig

__all__ = ["ANSWERS", "image_name", "normalise", "open_reference", "reference_of", "said_of"]

ANSWERS = "answers"
"""The column with all answers that are right, of which one is learnt."""


def normalise(
    row: Mapping[str, Any], format: Format, folder: Path | None, *, config: TrainConfig | None = None
) -> dict[str, Any]:
    """A row with images in its normal form; see :attr:`ft_core.plugins.ModalitySpec.rows`.

    Images are given in the messages' parts, ``{"type": "image", "image": X}``, or in the row's column ``images`` (a
    list) or ``image``, for parts ``{"type": "image"}`` or the word ``<image>`` in strings; where nothing says their
    places, they stand before the first user's text, as in TRL. X is a path (relative ones are looked for from the data
    file's folder), a ``data:`` URL, an object with ``bytes`` or ``path`` (as parquet files of the Hub have it), a PIL
    image, or, where the configuration allows it, a URL.

    A video stands in a part ``{"type": "video", "video": X}``, or in the row's column ``videos`` or ``video``, for
    parts ``{"type": "video"}`` or the word ``<video>``. X is a list of images, or as for images. In its place
    stand as many images as ``vision.video_frames`` says.

    Args:
        config: says how many frames are taken of a video, and which URLs are allowed; None: as by default. A row that
            is in its normal form already may have as many frames of a video; with None, as any configuration allows.

    Raises:
        DataError: no conversation, no image or too many, or one given in another way.
    """
    from ft_vision.asking import ASKING, normalise_asking

    if format.name in ASKING:
        return normalise_asking(row, format, folder, config)
    seen = Seen(row, folder, config)
    columns = {name: value for name, value in row.items() if name not in SEEN}
    for name in ("messages", "prompt", "completion", "conversations"):
        if isinstance(columns.get(name), list):
            columns[name] = [flat(message, name, number, seen) for number, message in enumerate(columns[name])]
    normal = format.normalise(columns)
    if "messages" not in normal:
        raise DataError("holds no conversation: task: vision trains on messages, or prompt and completion as messages")
    messages, images = seen.placed(normal["messages"], "messages")
    made: dict[str, Any] = {"messages": messages}
    if normal.get("tools"):
        made["tools"] = normal["tools"]
    if row.get(ANSWERS) is not None:
        made[ANSWERS] = _accepted(row[ANSWERS])
    return {**made, "images": images}


def _accepted(answers: Any) -> list[str]:
    """What a row accepts beside the answer that it ends with: texts, or objects with an ``answer`` as VQA has them."""
    listed = [answers] if isinstance(answers, str) else answers
    found: list[Any] = []
    if isinstance(listed, list):
        found = [one.get("answer") if isinstance(one, Mapping) else one for one in listed]
        texts = [text for text in found if isinstance(text, str)]
        if len(texts) == len(found):
            return list(dict.fromkeys(texts))
    other = next((kind_of(text) for text in found if not isinstance(text, str)), None)
    what = f"a list with {other}" if other else kind_of(answers)
    raise DataError(f"answers must be a list of texts, those that are accepted, not {what}")
