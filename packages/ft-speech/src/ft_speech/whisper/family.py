"""What of the modality `stt` Whisper does; see :class:`ft_speech.families.Family`."""

from __future__ import annotations

from typing import Any

from ft_speech.fast.verifying import prepare as verify
from ft_speech.whisper.collating import collator
from ft_speech.whisper.documents import dataset
from ft_speech.whisper.evaluating import evaluate
from ft_speech.whisper.loading import adapter_options, load_for_training, load_processor
from ft_speech.whisper.training import trainer

__all__ = [
    "adapter_options", "collator", "dataset", "evaluate", "fast", "load_for_training", "load_processor", "trainer",
    "verify",
]  # fmt: skip


def fast(model: Any) -> Any:
    """Whisper's fast layers, put into a model.

    Raises:
        ft_core.fast.NotFast: it has parts that they do not know.
    """
    from ft_speech.fast.whisper import enable

    return enable(model)
