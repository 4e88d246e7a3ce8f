"""What the modality ``tts`` does with a language model that writes a codec's tokens; see
:class:`ft_speech.families.Family`."""

from __future__ import annotations

from typing import Any

from ft_core.training.sft import text_collator as collator
from ft_speech.orpheus.documents import dataset
from ft_speech.orpheus.evaluating import evaluate
from ft_speech.orpheus.loading import adapter_options, load_for_training, load_processor

__all__ = [
    "adapter_options", "collator", "dataset", "evaluate", "fast", "load_for_training", "load_processor", "trainer",
]  # fmt: skip


def trainer(job: Any) -> None:
    """None: it is trained as any language model is."""


def fast(model: Any) -> None:
    """None: ft_core's own fast layers are made for it."""
