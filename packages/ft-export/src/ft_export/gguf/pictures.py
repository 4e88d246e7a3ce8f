"""Prompts with images, to be asked of llama.cpp and of transformers alike.

llama.cpp resizes images by code of its own, and not to the same pixels. So each image of the proof is brought to a size
that neither resizes; what llama.cpp makes of other sizes is its own affair, and is not compared.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError
from ft_export.gguf.engine import LlamaCpp
from ft_export.gguf.proof import Prompt
from ft_export.gguf.towers import Tower, unturned
from ft_export.logprobs import all_logprobs
from ft_export.samples import Row
from ft_export.seeing import PLACE, Seen, image_processor, image_settings, images_of, question_of, rendered, seen

__all__ = [
    "Pictures", "budget_of", "check_image_template", "leave_unturned", "pictures", "size_of", "without_images",
]  # fmt: skip

MOST = 4
"""Prompts with images: each is read a dozen times in fp32."""
AREA = (8, 4096)
"""Image tokens that llama.cpp gives a model of Qwen's at least and at most, unless it is told others."""


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    prompts: what is asked, each with what llama.cpp is sent once it has said its marker.
    texts: with ``PLACE`` for the image. images: one for each. encoded: the same as base64 of PNG.
    sight: nats by which another image moves the likeliest first tokens in transformers, the mean of the prompts.
    around: nats by which the text moves them that the model's processor puts around an image; None where it puts none.
    drawn: of each image, as :attr:`ft_export.seeing.Picture.drawn`.
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    images: tuple[Any, ...]
    encoded: tuple[str, ...]
    sight: float
    around: float | None
    drawn: tuple[str, ...]

    def asked(self, marker: str, bos: str) -> list[Prompt]:
        """With what llama.cpp is sent: it puts ``bos`` before a text itself."""
        found = []
        for prompt, text, encoded in zip(self.prompts, self.texts, self.encoded, strict=True):
            body = {"prompt_string": text.removeprefix(bos).replace(PLACE, marker), "multimodal_data": [encoded]}
            found.append(Prompt(prompt.text, prompt.ids, body))
        return found


def size_of(model: Path, config: Any, tower: Tower) -> tuple[int, int]:
    """Width and height of an image that neither llama.cpp nor transformers resizes.

    Raises:
        ExportError: the processor's bounds leave none.
    """
    if not tower.grid:
        return config.vision_config.image_size, config.vision_config.image_size
    edge = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    least, most = budget_of(model, config, tower) or AREA
    high = max(2, math.isqrt(max(least, 12) * 3 // 4))
    wide = max(high + 1, -(-max(least, 12) // high))
    if high * wide > most:
        high = wide = max(1, math.isqrt(most))
    if not least <= high * wide <= most:
        raise ExportError(f"{model} has a processor that leaves no size of an image: {least} to {most} tokens")
    return wide * edge, high * edge


def budget_of(model: Path, config: Any, tower: Tower) -> tuple[int, int] | None:
    """The least and the most tokens that an image becomes, by the processor's pixels; None where all have one size."""
    if not tower.grid:
        return None
    said = image_settings(model)
    edge = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    given = said.get("size")
    size: dict[str, Any] = given if isinstance(given, dict) else {}
    # as published, and as transformers 5 writes them; of these families both are numbers of pixels
    least = size.get("shortest_edge") or said.get("min_pixels") or AREA[0] * edge**2
    most = size.get("longest_edge") or said.get("max_pixels") or AREA[1] * edge**2
    return max(1, -(-int(least) // edge**2)), max(1, int(most) // edge**2)


def leave_unturned(model: Any, prompts: Sequence[Prompt]) -> tuple[int, int, float] | None:
    """Let a transformers model leave those frequencies unturned that llama.cpp does; it stays so.

    Returns:
        How many of how many they are, and by how many nats the prompts' likeliest first tokens move, the mean; None
        where there are none.
    """
    numbers = unturned(model.config)
    if not numbers:
        return None
    before = [all_logprobs(model, prompt.ids)[-1] for prompt in prompts]
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq[numbers] = 0.0
    moved = []
    for prompt, said in zip(prompts, before, strict=True):
        likeliest = said.topk(min(5, said.numel())).indices
        moved.append(float((all_logprobs(model, prompt.ids)[-1] - said)[likeliest].abs().mean()))
    return len(numbers), len(rotary.inv_freq), sum(moved) / len(moved)


def without_images(rows: Sequence[Row]) -> list[Row]:
    """The rows as conversations of text alone, answers included."""
    found = []
    for row in rows:
        messages = question_of(row, whole=True)
        found.append({"messages": [{**one, "content": one["content"].replace(PLACE, "")} for one in messages]})
    return found


def pictures(folder: Path, tower: Tower, model: Any, rows: Sequence[Row], tokenizer: Any) -> Pictures:
    """A prompt of each row's question, with one image of the row's or a drawn one.

    Args:
        folder: the model's. model: the same in transformers, in fp32.

    Raises:
        ExportError: there is no image processor, or the model does not take what it makes.
    """
    processor, config = image_processor(folder), model.config
    size = size_of(folder, config, tower)
    prompts, texts, images, encoded, moved, around, drawn = [], [], [], [], [], [], []
    for number, row in enumerate(rows[:MOST]):
        image, why = images_of(row, size, seed=number)[0]
        drawn.append(why)
        messages = _one_place(question_of(row, whole=False))
        bare = rendered(messages, tokenizer, ask=True)
        text = bare.replace(PLACE, tower.around + PLACE + tower.around)
        ids = seen(text, [image], tokenizer, processor, model)
        shown = text.replace(PLACE, tower.written)
        prompts.append(Prompt(shown, ids))
        texts.append(text)
        images.append(image)
        encoded.append(_png(image))
        said = all_logprobs(model, ids)[-1]
        likeliest = said.topk(min(5, said.numel())).indices

        def shift(other: Seen, said: Any = said, likeliest: Any = likeliest) -> float:
            return float((all_logprobs(model, other)[-1] - said)[likeliest].abs().mean())

        moved.append(shift(seen(text, [_inverted(image)], tokenizer, processor, model)))
        if tower.around:
            around.append(shift(seen(bare, [image], tokenizer, processor, model)))
    mean = sum(moved) / len(moved)
    return Pictures(
        tuple(prompts), tuple(texts), tuple(images), tuple(encoded), mean,
        sum(around) / len(around) if around else None, tuple(drawn),
    )  # fmt: skip


def _one_place(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same with the first image's place alone."""
    found, is_first = [], True
    for one in messages:
        head, place, tail = one["content"].partition(PLACE)
        kept = place if is_first else ""
        is_first = is_first and not place
        found.append({**one, "content": head + kept + tail.replace(PLACE, "")})
    return found


def _png(image: Any) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def _inverted(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.invert(image)


def check_image_template(engine: LlamaCpp, tokenizer: Any, tower: Tower, seen_: Pictures, bos: str) -> str | None:
    """Send an image over the OpenAI interface, and compare how the chat template is filled in.

    Returns:
        How llama.cpp's answer begins; None where there is no chat template.

    Raises:
        ExportError: the image stands elsewhere than transformers puts it, or the chat takes it otherwise.
    """
    if not tokenizer.chat_template:
        return None
    question = "What is in this picture?"
    url = {"url": f"data:image/png;base64,{seen_.encoded[0]}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": question}]
    own = [{"type": "image"}, {"type": "text", "text": question}]
    expected = str(
        tokenizer.apply_chat_template([{"role": "user", "content": own}], tokenize=False, add_generation_prompt=True)
    )
    asked = [{"role": "user", "content": parts}]
    prompt = engine.apply_template(asked)
    found = prompt.replace(engine.marker(), tower.written)
    if expected not in (found, bos + found):
        raise ExportError(
            f"llama.cpp puts an image into the chat template otherwise than transformers: {found[-200:]!r}, not "
            f"{expected[-200:]!r}"
        )
    body = {"prompt_string": prompt.removeprefix(bos), "multimodal_data": [seen_.encoded[0]]}
    run = engine.greedy(body, 8, 1)
    length = engine.chat_length(engine.models()[0], asked)
    if length != run.read:
        raise ExportError(
            f"llama.cpp's chat makes {length} tokens of a question with an image, the chat template makes {run.read}"
        )
    return run.text
