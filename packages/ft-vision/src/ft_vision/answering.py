"""Answers of a model that sees, to prompts with images: what `ft generate` and `ft chat` ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ft_core.answering import Question
from ft_core.data import Collator
from ft_core.data.formats import FORMATS
from ft_core.errors import DataError
from ft_vision.collating import VisionCollator, collator_for
from ft_vision.documents import IMAGES, THREADS, VisionRenderer
from ft_vision.families.parts import FAMILIES
from ft_vision.images import ImageError, read_image
from ft_vision.rows import image_name, normalise, open_reference

if TYPE_CHECKING:
    from ft_core.config import TrainConfig
    from ft_core.models import ModelSource
    from ft_core.models.opening import Target

__all__ = ["VisionAnswerer", "knows"]

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The files of which a model that sees has one."""


def knows(source: ModelSource) -> bool:
    """Whether a model is of a family that sees, and there is what makes tensors of its images."""
    try:
        kind = json.loads((source.path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return kind in FAMILIES and any((source.path / name).is_file() for name in PROCESSORS)


@dataclass(frozen=True)
class Asked:
    """A question in the normal form of rows, without an answer.

    Attributes:
        row: see :mod:`ft_vision.rows`. sizes: width and height of its images, by reference. question: as it was given.
        ids: its tokens, once they are known.
    """

    row: dict[str, Any]
    sizes: dict[str, tuple[int, int]]
    question: Question
    ids: tuple[int, ...] = field(default=())


class VisionAnswerer:
    """Answers of a run or a model that sees; an :class:`ft_core.answering.Answerer`.

    Prompts are text, or conversations with images as the training data have them; their images are read before a model
    is loaded. Answers are by transformers' own ``generate``.
    """

    images = True

    def __init__(self, target: Target) -> None:
        self._target = target
        self.model: Any = None
        self.tokenizer: Any = None
        self._renderer: VisionRenderer
        self._collate: VisionCollator

    def check(self, questions: Sequence[Question], folder: Path) -> list[Any]:
        """Each question in normal form, all of its images having been decoded once.

        Raises:
            DataError: a conversation that cannot be read, or an image that cannot be used.
        """
        run = self._target.run
        config = None if run is None else run.config  # which says what URLs may be asked
        rows = [_normal(question, folder, config) for question in questions]
        sizes: dict[str, tuple[int, int]] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for question, row in zip(questions, rows, strict=True):
                new = [image for image in dict.fromkeys(row["images"]) if image not in sizes]
                try:
                    sizes |= zip(new, pool.map(_size, new), strict=True)
                except ImageError as error:
                    raise question.wrong(error) from error
        made = zip(rows, questions, strict=True)
        return [Asked(row, {image: sizes[image] for image in row["images"]}, question) for row, question in made]

    def open(self, say: Callable[[str], None]) -> None:
        """Load the processor and the model.

        Raises:
            FtError: one cannot be.
        """
        from transformers import AutoModelForImageTextToText

        from ft_core.models.opening import open_target
        from ft_vision.loading import load_processor

        self.model, self.tokenizer = open_target(self._target, auto=AutoModelForImageTextToText, say=say)
        self.model.config.get_text_config().use_cache = True  # loading for training has switched it off
        config, source = _config(self._target)
        processor = load_processor(source, config, self.tokenizer)
        self._renderer = VisionRenderer(processor)
        text = Collator(self.tokenizer.pad_token_id, padding_free=False)
        self._collate = collator_for(self.model, processor, text, self._target.reference)

    def encode(self, checked: Sequence[Any], system: str | None) -> list[Any]:
        """Questions with their token ids.

        Raises:
            DataError: the chat template refuses one, or it fills the model's positions.
        """
        return [self._encoded(one, system, number) for number, one in enumerate(checked, 1)]

    def answers(self, encoded: Sequence[Any], **settings: Any) -> list[str]:
        """The answers, in order."""
        from ft_core.generation import generate_ids

        ids = [one.ids for one in encoded]
        return generate_ids(self.model, self.tokenizer, ids, inputs=self._inputs(encoded), **settings)

    def stream(
        self, history: Sequence[dict[str, Any]], folder: Path, stopped: Event | None = None, **settings: Any
    ) -> Generator[str, None, None]:
        """The answer to a conversation piece by piece.

        Raises:
            DataError: an image cannot be used, or as :meth:`encode`.
        """
        from ft_core.generation import stream_ids

        (checked,) = self.check([Question(list(history))], folder)
        asked = self._encoded(checked, None, None)
        inputs = self._inputs([asked])
        yield from stream_ids(self.model, self.tokenizer, asked.ids, inputs=inputs, stopped=stopped, **settings)

    def _encoded(self, one: Asked, system: str | None, number: int | None) -> Asked:
        from ft_core.prompts import encode_prompt, room

        row, question = one.row, one.question
        if system and row["messages"][0]["role"] != "system":
            row = {**row, "messages": [{"role": "system", "content": system}, *row["messages"]]}
        self._renderer.sizes |= one.sizes
        for image in row["images"]:
            try:
                self._renderer.word(one.sizes[image])
            except ImageError as error:
                raise question.wrong(f"{image_name(image)}: {error}") from error
        try:
            ids = encode_prompt(self._renderer.question(row), self.tokenizer)
        except DataError as error:
            raise question.wrong(error) from error
        room(self.model, len(ids), 1, "the conversation" if number is None else f"prompt {number}")
        return Asked(row, one.sizes, question, tuple(ids))

    def _inputs(self, encoded: Sequence[Asked]) -> Callable[[Sequence[int]], dict[str, Any]]:
        """Makes batches of some of these questions."""

        def make(numbers: Sequence[int]) -> dict[str, Any]:
            some = [encoded[number] for number in numbers]
            rows = [{"input_ids": one.ids, "labels": one.ids, IMAGES: one.row["images"]} for one in some]
            return _padded_left(self._collate(rows))

        return make


def _config(target: Target) -> tuple[TrainConfig, ModelSource]:
    """The configuration that says how images are seen, and the model whose processor sees them."""
    from ft_core.config import TrainConfig
    from ft_core.models import find_model

    if target.run is None:
        assert target.source is not None
        return TrainConfig(model=target.reference, task="vision", data="none", output="none"), target.source
    run = target.run
    trained_whole = not run.adapter.is_dir() and run.model.is_dir()
    return run.config, find_model(str(run.model) if trained_whole else run.config.model)


def _normal(question: Question, folder: Path, config: TrainConfig | None) -> dict[str, Any]:
    """The row of a question. What reads rows wants an answer in each, which is given it and taken away."""
    turns = question.prompt
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    shared = any(isinstance(turn, Mapping) and turn.get("from") is not None for turn in turns)
    name, form = ("conversations", "sharegpt") if shared else ("messages", "messages")
    answer = {"from": "gpt", "value": "-"} if shared else {"role": "assistant", "content": "-"}
    row: dict[str, Any] = {name: [*turns, answer]}
    if question.images is not None:
        row["images"] = [*question.images]
    try:
        made = normalise(row, FORMATS[form], folder, config=config)
    except DataError as error:
        raise question.wrong(error) from error
    return {**made, "messages": made["messages"][:-1]}


def _size(image: str) -> tuple[int, int]:
    """Of an image that can be used: what is damaged shows in its pixels alone."""
    size: tuple[int, int] = read_image(open_reference(image)).size
    return size


def _padded_left(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that was padded on the right, for answers to begin where its rows end."""
    import torch

    batch = {name: value for name, value in batch.items() if name != "labels"}
    mask = batch["attention_mask"]
    moved = (mask.shape[1] - mask.sum(1)).tolist()
    for name, value in batch.items():
        if value.shape == mask.shape:
            batch[name] = torch.stack([row.roll(by) for row, by in zip(value, moved, strict=True)])
    return batch
