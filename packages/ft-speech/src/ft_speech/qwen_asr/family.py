"""What of the modality ``stt`` Qwen3-ASR does itself; see :class:`ft_speech.families.Family`."""

from __future__ import annotations

from typing import Any

from ft_speech.qwen_asr.collating import collator
from ft_speech.qwen_asr.documents import dataset
from ft_speech.qwen_asr.evaluating import evaluate
from ft_speech.qwen_asr.loading import adapter_options, load_for_training, load_processor
from ft_speech.qwen_asr.verifying import prepare as verify

__all__ = [
    "adapter_options", "collator", "dataset", "evaluate", "fast", "load_for_training", "load_processor", "trainer",
    "verify",
]  # fmt: skip


def trainer(job: Any) -> None:
    """None: it is trained as a language model, by the method's own trainer."""


def fast(model: Any) -> None:
    """None: ft_core's fast layers are made for it (:func:`ft_speech.qwen_asr.layout.describe`)."""
