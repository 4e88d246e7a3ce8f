"""Batches for Whisper: recordings read, varied and turned into features when a batch is made, in the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_speech.audio import AudioError
from ft_speech.listening.augment import mask_features, vary_samples
from ft_speech.listening.recordings import UnusableAudio
from ft_speech.listening.settings import AugmentSettings
from ft_speech.references import open_row
from ft_speech.whisper.documents import SLACK
from ft_speech.whisper.loading import settings_of

if TYPE_CHECKING:
    from ft_core.training import Job

__all__ = ["WhisperCollator", "collator", "workers_of"]

WORKERS = 4
"""Processes that make batches ahead of a GPU, unless the configuration says how many."""


@dataclass(frozen=True)
class WhisperCollator:
    """Makes a batch of rows, each a dict of ``audio`` (a reference), ``start``, ``end``, ``labels``, and whether it is
    ``varied`` and ``timed`` (its labels hold times, so that its speed stays).

    The batch: ``input_features``, float32 [rows, mel bands, frames], of a recording filled up with silence to what the
    model hears; ``labels``, int64 [rows, tokens], -100 where a row has no more; and ``tokens``, how many are none of
    these, a number that the trainer takes.

    Attributes:
        extractor: the model's ``WhisperFeatureExtractor``.
        augment: how recordings are varied.
        trim_silence: below how many dB the ends of recordings are trimmed; None: not.

    Raises:
        UnusableAudio: when it is called: a recording that cannot be read any more, is damaged, or too long.
    """

    extractor: Any
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    trim_silence: float | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        features = np.stack([self._features(row) for row in rows])
        longest = max(len(row["labels"]) for row in rows)
        labels = torch.full((len(rows), longest), IGNORE)
        for number, row in enumerate(rows):
            labels[number, : len(row["labels"])] = torch.tensor(row["labels"])
        tokens = sum(len(row["labels"]) for row in rows)
        return {"input_features": torch.from_numpy(features), "labels": labels, "tokens": tokens}

    def _features(self, row: Mapping[str, Any]) -> Any:
        import torch

        extractor, rate = self.extractor, int(self.extractor.sampling_rate)
        try:
            most = extractor.n_samples / rate + SLACK
            samples = open_row(row, rate, max_seconds=most, trim_silence=self.trim_silence)
        except (AudioError, DataError) as error:
            raise UnusableAudio(
                f"{error} (mend it, and go on; stt.on_bad_audio: skip leaves rows out that cannot be used)"
            ) from error
        chance = None
        if row.get("varied") and self.augment != AugmentSettings():
            # From torch's numbers, which follow the run's seed, in a worker its own. A run that goes on draws others
            # than one that was never stopped: a batch is made ahead of the step that a checkpoint is of.
            chance = np.random.default_rng(int(torch.randint(2**31, ()).item()))
            made = vary_samples(samples, rate, self.augment, chance, speed=not row.get("timed"))
            samples = made if len(made) <= extractor.n_samples else samples
        made = extractor(samples, sampling_rate=rate, return_tensors="np")["input_features"][0].astype(np.float32)
        if chance is not None:
            frames = min(made.shape[1], -(-len(samples) // int(extractor.hop_length)))
            made = mask_features(made, frames, self.augment, chance)
        return made


def collator(job: Job) -> WhisperCollator:
    """The collator of a training; see :attr:`ft_core.plugins.ModalitySpec.collator`. Batches are made in workers."""
    settings = settings_of(job.config)
    job.arguments["dataloader_num_workers"] = workers_of(job.config, on_cpu=job.arguments["use_cpu"])
    return WhisperCollator(job.processor.feature_extractor, settings.augment, settings.trim_silence)


def workers_of(config: Any, *, on_cpu: bool) -> int:
    """How many processes make batches ahead."""
    workers = settings_of(config).workers
    return workers if workers is not None else 0 if on_cpu else WORKERS
