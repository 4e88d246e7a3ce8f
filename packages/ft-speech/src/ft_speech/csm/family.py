"""What the modality ``tts`` does with a CSM; see :class:`ft_speech.families.Family`."""

from __future__ import annotations

from ft_speech.csm.collating import collator
from ft_speech.csm.documents import dataset
from ft_speech.csm.evaluating import evaluate
from ft_speech.csm.layout import fast
from ft_speech.csm.loading import adapter_options, load_for_training, load_processor
from ft_speech.csm.training import trainer

__all__ = [
    "adapter_options", "collator", "dataset", "evaluate", "fast", "load_for_training", "load_processor", "trainer",
]  # fmt: skip
