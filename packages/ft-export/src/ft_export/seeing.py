"""Models that see: which they are, the class that loads them, and conversations with images as what they take.

An image's tokens are counted by the model itself, from what its tower and projector make of the pixels, and stand as
often as it says. So no family's processor is needed, some of which want torchvision or more, and no rule of resizing is
written a second time: only the images' own processor is asked, which works with Pillow.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ft_export.errors import ExportError
from ft_export.hearing import speech_class
from ft_export.opening import NotReadError, open_image
from ft_export.runs import read_json
from ft_export.samples import Row

if TYPE_CHECKING:
    import torch

__all__ = [
    "PLACE", "QUESTION", "Picture", "Seen", "draw", "extended", "image_inputs", "image_processor", "image_settings",
    "images_of", "model_class", "question_of", "rendered", "seen", "seen_rows", "sees", "text_config", "told",
]  # fmt: skip

PLACE = "\ufdd0"
"""Stands for an image in a text that is not split yet: no character, and never one of a text (Unicode 16, 23.7)."""
QUESTION = "What is in this picture?"
LONGEST = 96
"""Tokens of text on either side of an image, at most."""
EDGE = 336
"""Pixels of an image's longer edge in a proof, at most: the models are compared on what they see, not on how much."""
TAKEN = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
"""What image processors make that models take."""
TYPES = ("mm_token_type_ids", "token_type_ids")
"""The keywords that say which tokens are an image's, of the families that have one."""


class Picture(NamedTuple):
    """An image of a proof, RGB.

    Attributes:
        image: of Pillow's. drawn: for what it was drawn, such as "a URL, which is not fetched"; nothing: the row's own.
    """

    image: Any
    drawn: str


class Seen(tuple[int, ...]):
    """Token ids of a conversation with images, and what goes with them into the model.

    Attributes:
        inputs: by the keyword of the model's forward: pixels, their sizes, which tokens are an image's.
        drawn: of each image, as :attr:`Picture.drawn`; nothing where they are of no row.
    """

    inputs: dict[str, torch.Tensor]
    drawn: tuple[str, ...] = ()

    def __new__(cls, ids: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> Seen:
        made = super().__new__(cls, ids)
        made.inputs = dict(inputs)
        return made


def sees(config: Any) -> bool:
    """Whether a transformers configuration is of a model that answers texts with images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return getattr(config, "vision_config", None) is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def model_class(config: Any) -> Any:
    """The transformers class that loads a model: of language, with its tower where it has one, or of speech."""
    import transformers

    if (kind := speech_class(config)) is not None:
        return kind
    return transformers.AutoModelForImageTextToText if sees(config) else transformers.AutoModelForCausalLM


def text_config(config: Any) -> Any:
    """The configuration of the language model; whether its embeddings are the head, too, only the whole one says.

    It is told, too, to how many of its layers what a tower's layers saw is added (``deepstack_layers``).
    """
    if not sees(config):
        return config
    import copy

    text = copy.deepcopy(config.get_text_config())
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    text.deepstack_layers = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    return text


def image_settings(folder: Path) -> dict[str, Any]:
    """What the images' processor of a model's folder is told; nested in the whole processor's file or by itself.

    Raises:
        ExportError: there is none.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        said = read_json(folder / name) if (folder / name).is_file() else {}
        said = {**said, **said["image_processor"]} if isinstance(said.get("image_processor"), dict) else said
        if "image_mean" in said:
            return said
    raise ExportError(
        f"{folder} says nothing of its images (no image_mean in processor_config.json or preprocessor_config.json)"
    )


def image_processor(folder: Path) -> Any:
    """The processor that makes pixels of images, with Pillow alone where it can.

    Raises:
        ExportError: there is none, or it needs what is not installed.
    """
    from importlib.util import find_spec

    import transformers

    if find_spec("PIL") is None:
        raise ExportError(f"{folder} is a model that sees, which cannot be proven without Pillow: pip install pillow")
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        found = _by_pillow(folder) if isinstance(error, ImportError) else None
        if found is not None:
            return found
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{folder} has no image processor that transformers loads here: {reason}") from error


def _by_pillow(folder: Path) -> Any:
    """A processor that takes Pillow alone, which transformers before 5.23 loads by its own name only; or None."""
    import transformers

    try:
        said = image_settings(folder)
    except ExportError:
        return None
    name = str(said.get("image_processor_type") or said.get("feature_extractor_type"))
    for ending in ("Pil", "Fast"):
        name = name.removesuffix(ending)
    try:
        return getattr(transformers, f"{name}Pil").from_dict(said)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None


def draw(width: int, height: int, seed: int = 0) -> Any:
    """A picture with edges, gradients and some noise, the same for the same arguments; an RGB image of Pillow's."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(seed)
    across, down = np.linspace(0, 255, width)[None, :], np.linspace(0, 255, height)[:, None]
    pixels = np.stack([across + 0 * down, down + 0 * across, 255 - (across + down) / 2], -1)
    for _ in range(6):
        left, top = int(chance.integers(0, width)), int(chance.integers(0, height))
        right, bottom = left + max(1, width // 3), top + max(1, height // 4)
        pixels[top:bottom, left:right] = chance.integers(0, 256, 3)
    pixels += chance.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def images_of(row: Row, size: tuple[int, int] | None = None, seed: int = 0) -> list[Picture]:
    """A row's images, or drawn ones in the place of those that are not read; one at least.

    Args:
        size: width and height to bring each to; else no more than ``EDGE`` pixels to an edge.
        seed: of what is drawn.
    """
    given = row.get("images")
    found = []
    for number, reference in enumerate(given if isinstance(given, list) and given else [None]):
        why = ""
        try:
            if not isinstance(reference, str):
                raise NotReadError("a row without images")
            image = open_image(reference)
        except NotReadError as error:  # moved since training, say: the proof only needs some image
            why = str(error)
            image = draw(*(size or (EDGE, EDGE * 3 // 4)), seed=seed + number)
        if size is not None:
            image = image.resize(size)
        else:
            image.thumbnail((EDGE, EDGE))
        found.append(Picture(image, why))
    return found


def told(drawn: Iterable[str], how: str = "drawn") -> str:
    """How many images are the rows' own, and how many were drawn, for what.

    Args:
        drawn: for each image why it was drawn, or nothing (``Picture.drawn``).
        how: what is done in the place of one that is not the row's own; a sound is ``made``.
    """
    whys = list(drawn)
    counts = Counter(filter(None, whys))
    what = "; ".join(f"{count} for {why}" for why, count in counts.items())
    own = whys.count("")
    return f"{own} of the rows' own, " + (f"{len(whys) - own} {how} ({what})" if counts else f"none {how}")


def question_of(row: Row, whole: bool) -> list[dict[str, str]]:
    """A row's messages as texts with ``PLACE`` for each image, up to the question or with the answer.

    The first image stands before the first user's text where the row says no place for it.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        text = str(row.get("text") or QUESTION)
        return [{"role": "user", "content": PLACE + text}]
    found = [{"role": str(one.get("role")), "content": _flat(one.get("content"))} for one in messages]
    while not whole and len(found) > 1 and found[-1]["role"] == "assistant":
        found.pop()
    if not any(PLACE in one["content"] for one in found):
        first = next((one for one in found if one["role"] == "user"), found[0])
        first["content"] = PLACE + first["content"]
    return found


def _flat(content: Any) -> str:
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict)]
        return "".join(PLACE if part.get("type") == "image" else str(part.get("text") or "") for part in parts)
    return str(content or "")


def rendered(messages: Sequence[Mapping[str, str]], tokenizer: Any, ask: bool) -> str:
    """The conversation in the chat template, ``PLACE`` for each image; its texts alone where the template cannot.

    Args:
        ask: whether the assistant is to speak.
    """
    places = sum(one["content"].count(PLACE) for one in messages)
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    for form in (parts, list(messages)) if tokenizer.chat_template else ():
        try:
            text = str(tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=ask))
        except Exception:  # a template is a program of the model's, its errors have no common type
            continue
        if text.count(PLACE) == places:
            return text
    return "\n".join(one["content"] for one in messages)


def image_inputs(images: Sequence[Any], processor: Any, model: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Pixels of a conversation's images as the model takes them, and how many tokens each becomes.

    Raises:
        ExportError: the model does not take what its processor makes.
    """
    import torch

    counts, made = [], []
    for image in images:
        # each alone first: a family's tiles are not told apart by the features of several images
        inputs = {name: torch.as_tensor(value) for name, value in _processed(processor, [image]).items()}
        try:
            with torch.inference_mode():
                features = _base(model).get_image_features(**inputs).pooler_output
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ExportError(f"the model does not take the pixels that its processor makes: {reason}") from error
        pieces = [features] if isinstance(features, torch.Tensor) else list(features)
        counts.append(sum(piece.numel() // piece.shape[-1] for piece in pieces))
        made.append(inputs)
    together = made[0]
    if len(images) > 1:
        together = {name: torch.as_tensor(value) for name, value in _processed(processor, images).items()}
    return together, counts


def _processed(processor: Any, images: Sequence[Any]) -> dict[str, Any]:
    """By the processor; some want a list of images for each row, and make a dimension of rows."""
    rows = "max_image_size" in getattr(processor, "__dict__", {})
    made = processor(images=[list(images)] if rows else list(images), return_tensors="pt")
    return {name: value for name, value in made.items() if name in TAKEN}


def _base(model: Any) -> Any:
    """The transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def seen(text: str, images: Sequence[Any], tokenizer: Any, processor: Any, model: Any, ends: bool = True) -> Seen:
    """What a model takes of a text with ``PLACE`` for each image.

    Args:
        ends: whether the tokens that begin and end an image are put around it, where the configuration names some.

    Raises:
        ExportError: there are not as many images as places, or the model does not take them.
    """
    import torch

    pieces = text.split(PLACE)
    if len(pieces) != len(images) + 1:
        raise ExportError(f"a text has {len(pieces) - 1} places for {len(images)} images")
    inputs, counts = image_inputs(images, processor, model)
    config = _base(model).config
    image = getattr(config, "image_token_id", None)
    if not isinstance(image, int):
        raise ExportError(f"a {config.model_type} names no token of an image's pieces (image_token_id)")
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        words = tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(words) > 2 * LONGEST:
            words = words[:LONGEST] + words[-LONGEST:]
        ids += words
        if number < len(images):
            begin, end = _ends(config) if ends else ((), ())
            ids += [*begin, *[image] * counts[number], *end]
    taken = inspect.signature(_base(model).forward).parameters
    for name in TYPES:
        if name in taken:
            inputs[name] = (torch.tensor([ids]) == image).long()
    return Seen(ids, inputs)


def _ends(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for begin, end in (("vision_start_token_id", "vision_end_token_id"), ("boi_token_index", "eoi_token_index")):
        if isinstance(getattr(config, begin, None), int) and isinstance(getattr(config, end, None), int):
            return (getattr(config, begin),), (getattr(config, end),)
    return (), ()


def seen_rows(rows: Sequence[Row], tokenizer: Any, processor: Any, model: Any) -> Iterator[Seen]:
    """Whole rows with their images, answers included, as what a model takes.

    Raises:
        ExportError: the model does not take its processor's pixels.
    """
    for seed, row in enumerate(rows):
        messages = question_of(row, whole=True)
        places = sum(one["content"].count(PLACE) for one in messages)
        pictures = images_of(row, seed=seed)
        pictures = [pictures[number % len(pictures)] for number in range(places)]
        images = [one.image.copy() for one in pictures]
        made = seen(rendered(messages, tokenizer, ask=False), images, tokenizer, processor, model)
        made.drawn = tuple(one.drawn for one in pictures)
        yield made


def extended(ids: Sequence[int], more: Sequence[int]) -> Sequence[int]:
    """Ids with further ones of text behind them; what goes with them goes with these, too."""
    if not isinstance(ids, Seen):
        return [*ids, *more]
    import torch

    inputs = dict(ids.inputs)
    for name in TYPES:
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros(1, len(more), dtype=torch.long)], 1)
    made = Seen([*ids, *more], inputs)
    made.drawn = ids.drawn
    return made
