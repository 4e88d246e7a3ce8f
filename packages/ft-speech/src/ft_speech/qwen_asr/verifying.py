"""What ``ft verify`` compares of a Qwen3-ASR: its first layers behind its whole encoder, on rows with recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ft_core.data import Collator
from ft_speech.qwen_asr.collating import collator_for, drawn
from ft_speech.qwen_asr.loading import load_processor

if TYPE_CHECKING:
    from ft_core.models import Device, ModelSource

__all__ = ["prepare"]

SECONDS = (0.6, 1.7, 0.3)
"""Of the documents' recordings: one that the encoder's convolutions see at once, and one that they do not."""


def prepare(
    source: ModelSource, device: Device, *, quantization: str, dtype: str, layers: int, batches: int, tokens: int
) -> tuple[Callable[[bool], Any], list[dict[str, Any]]]:
    """How to load the model, and what to compare it on; see :attr:`ft_core.plugins.ModalitySpec.verify`.

    Each batch is a row of three documents, each with a recording of noise and random tokens after it, ``tokens`` of
    these in all.

    Raises:
        ModelError: the model, its tokenizer or its processor cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

    from ft_core.models import load_tokenizer
    from ft_core.models.loading import load_layers

    processor = load_processor(source, None, load_tokenizer(source))
    with torch.device("meta"):  # its class is all that a collator asks for
        bare = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.from_pretrained(source.path, trust_remote_code=False))
    collate = collator_for(bare, processor, Collator(0, lengths=True))
    first, second = tokens // 2, tokens // 3
    shapes = tuple(zip((first, second, tokens - first - second), SECONDS, strict=True))
    inputs = [collate(drawn(processor, shapes, seed)) for seed in range(batches)]

    def load(exact: bool) -> Any:
        kind = "none" if exact else quantization
        return load_layers(source, device, kind, dtype, layers, AutoModelForSpeechSeq2Seq)

    return load, inputs
