"""What a merged model and the adapter on its base are compared on: held-out rows, with what is seen or heard."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ft_export.bases import processor_folder, read_config
from ft_export.hearing import Heard, Spoken, feature_extractor, heard_rows, listens, speech_family
from ft_export.runs import Source
from ft_export.samples import Row, read_rows, token_ids
from ft_export.seeing import Seen, image_processor, seen_rows, sees, told

__all__ = ["PICTURED", "SPOKEN", "Texts", "check_inputs", "of_texts", "samples_told", "texts_of"]

PICTURED = 4
"""Rows with images or sounds that models read: either is hundreds of tokens."""
SPOKEN = 32
"""Tokens of a codec that are put behind a text that is spoken."""

Texts = Sequence[Sequence[int]] | Callable[[Any], Sequence[Sequence[int]]]
"""Token ids, or a function that makes them of a transformers model, which counts the tokens of an image or a sound."""


def check_inputs(adapter: Path, base: Path) -> None:
    """
    Raises:
        ExportError: the model sees or listens, and neither folder has what turns its input into tensors.
    """
    config = read_config(base)
    if sees(config):
        image_processor(processor_folder(adapter, base))
    elif listens(config):
        feature_extractor(processor_folder(adapter, base))


def texts_of(source: Source, folder: Path, tokenizer: Any) -> Texts:
    """Of a run's held-out rows, else of built-in sentences, for the model in ``folder``."""
    rows, config = read_rows(source.held_out), read_config(folder)
    if sees(config):
        return partial(_with_images, rows[:PICTURED], tokenizer, image_processor(folder))
    if speech_family(config) is not None:
        return partial(_with_sounds, rows[:PICTURED], tokenizer, folder)
    found = of_texts(rows, tokenizer) or of_texts(read_rows(None), tokenizer)
    return [_spoken(ids, tokenizer, seed) for seed, ids in enumerate(found)] if source.task == "tts" else found


def of_texts(rows: Sequence[Row], tokenizer: Any) -> list[list[int]]:
    """Rows of text as token ids; those of fewer than two have nothing to say."""
    return [ids for ids in (token_ids(row, tokenizer) for row in rows) if len(ids) > 1]


def samples_told(samples: Sequence[Sequence[int]]) -> list[str]:
    """What of the samples was seen or heard, for people."""
    if pictured := [text for text in samples if isinstance(text, Seen)]:
        whose = told(why for text in pictured for why in text.drawn)
        return [f"each of {len(pictured)} texts was read with images: {whose}"]
    if heard := [text for text in samples if isinstance(text, Heard)]:
        whose = told((text.made for text in heard), "made")
        return [f"each of {len(heard)} texts was read with the sound of it: {whose}"]
    if spoken := [text for text in samples if isinstance(text, Spoken)]:
        frames = sum(len(text.codes) for text in spoken)
        return [f"each of {len(spoken)} texts was read with codes after it, drawn by chance: {frames} frames"]
    return []


def _with_images(rows: list[Row], tokenizer: Any, processor: Any, model: Any) -> list[Seen]:
    return list(seen_rows(rows, tokenizer, processor, model))


def _with_sounds(rows: list[Row], tokenizer: Any, folder: Path, model: Any) -> list[Heard | Spoken]:
    return list(heard_rows(rows, tokenizer, folder, model))


def _spoken(ids: list[int], tokenizer: Any, seed: int) -> list[int]:
    """A text and tokens of the vocabulary's later half, where those of a codec are: rows do not hold them."""
    size = len(tokenizer)
    return [*ids, *random.Random(seed).choices(range(size // 2, size), k=SPOKEN)]
