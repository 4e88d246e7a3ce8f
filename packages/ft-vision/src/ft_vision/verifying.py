"""What ``ft verify`` compares of a model that sees: its first layers behind its whole tower, on rows with images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ft_core.data import Collator
from ft_vision.collating import TRIED, collator_for, drawn
from ft_vision.loading import config_of, processor_of

if TYPE_CHECKING:
    from ft_core.models import Device, ModelSource

__all__ = ["prepare"]

WIDER = (96, 64)
"""Width and height of a row's second image."""


def prepare(
    source: ModelSource, device: Device, *, quantization: str, dtype: str, layers: int, batches: int, tokens: int
) -> tuple[Callable[[bool], Any], list[dict[str, Any]]]:
    """How to load the model, and what to compare it on; see :attr:`ft_core.plugins.ModalitySpec.verify`.

    Each batch is a row of three documents of random tokens, ``tokens`` in all beside those of two images of noise: one
    within the first document, one of another shape within the last.

    Raises:
        ModelError: the model, its tokenizer or its processor cannot be loaded, or it is of no known family.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from ft_core.models import load_tokenizer
    from ft_core.models.loading import load_layers

    processor = processor_of(source, load_tokenizer(source))
    with torch.device("meta"):  # its class and configuration are all that a collator asks for
        bare = AutoModelForImageTextToText.from_config(config_of(source))
    collate = collator_for(bare, processor, Collator(0, lengths=True), source.reference)
    collate = replace(collate, options={**collate.options, **collate.family.tried})
    first, second = tokens // 2, tokens // 3
    last = tokens - first - second
    shapes = ((2, first - 2, TRIED), (second, 0, None), (2, last - 2, WIDER))
    inputs = [collate(drawn(collate, processor, shapes, seed)) for seed in range(batches)]

    def load(exact: bool) -> Any:
        kind = "none" if exact else quantization
        return load_layers(source, device, kind, dtype, layers, AutoModelForImageTextToText)

    return load, inputs
