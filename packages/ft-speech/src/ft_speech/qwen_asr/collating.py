"""Batches of documents with recordings: spectra made by the model's own processor, each recording alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ft_core.data import Collator, keeps_documents_apart
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_speech.audio import AudioError
from ft_speech.listening.augment import mask_features, vary_samples
from ft_speech.listening.recordings import UnusableAudio
from ft_speech.listening.settings import AugmentSettings
from ft_speech.qwen_asr.documents import RECORDINGS, AsrRenderer, Heard
from ft_speech.qwen_asr.loading import settings_of
from ft_speech.qwen_asr.parts import ENCODER, SAMPLING_RATE, audio_tokens
from ft_speech.references import audio_name, open_row, reference_of

if TYPE_CHECKING:
    import torch

    from ft_core.training import Job

__all__ = ["AsrCollator", "collator", "collator_for", "drawn", "packs"]

WORKERS = 4
"""Processes that make batches ahead of a GPU, unless the configuration says how many."""
LOOKED_AT = 64
"""Rows among which the shortest documents are found."""
OFF = 0.1
"""Seconds by which a recording may be longer or shorter than its header says: it is cut, or filled up with silence."""


@dataclass(frozen=True)
class AsrCollator:
    """Makes a batch of rows, each a dict of ``input_ids``, ``labels`` and, where packed, ``seq_lengths``, with
    ``recordings``, one for each document (:data:`ft_speech.qwen_asr.documents.RECORDINGS`).

    Text is batched as :class:`ft_core.data.Collator` does. Beside it stand the recordings of the batch, in their order:
    ``input_features``, [recordings, mel bins, frames], each one's log-mel spectrum as the processor makes it of that
    recording alone, filled up with zeros; and ``input_features_mask``, int64 [recordings, frames], 1 where a recording
    is. (A processor that is handed several makes a frame more of one that is not the longest.)

    Attributes:
        text: batches the text.
        processor: the model's.
        dtype: of the spectra, the encoder's.
        augment: how recordings of training rows are varied: by noise and by SpecAugment.
        holds: what rows hold beside text, for messages.

    Raises:
        UnusableAudio: when it is called: a recording that cannot be read any more, is damaged, or has another length.
    """

    text: Collator
    processor: Any
    dtype: torch.dtype
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    holds: str = "recordings"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.text(features)
        return batch | self.spectra([one for feature in features for one in feature[RECORDINGS]])

    def spectra(self, recordings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the forward pass is handed of recordings, as they stand in the column ``recordings``."""
        return self._together(
            [self._varied(one) if self._varies(one) else self._of(_fitting(one)) for one in recordings]
        )

    def spectra_of(self, samples: Sequence[Any]) -> dict[str, Any]:
        """What the forward pass is handed of recordings, each float32 [samples] at 16 kHz."""
        return self._together([self._of(one) for one in samples])

    def left_padded(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Prompts that are answered together: ``input_ids`` and ``attention_mask``, int64 [prompts, longest]."""
        import torch

        pad = torch.nn.utils.rnn.pad_sequence
        rows = [torch.tensor(list(ids), dtype=torch.int64) for ids in prompts]
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=self.text.pad_token_id, padding_side="left"),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"),
        }

    def _together(self, made: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        import torch

        longest = max(one.shape[-1] for one, _ in made)
        pad = torch.nn.functional.pad
        return {
            "input_features": torch.cat([pad(one, (0, longest - one.shape[-1])) for one, _ in made]).to(self.dtype),
            "input_features_mask": torch.cat([pad(one, (0, longest - one.shape[-1])) for _, one in made]),
        }

    def _of(self, samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.processor(text=[self.processor.audio_token], audio=[samples], sampling_rate=SAMPLING_RATE)
        return made["input_features"], made["input_features_mask"].long()

    def _varies(self, recording: Mapping[str, Any]) -> bool:
        return bool(recording.get("varied")) and self.augment != AugmentSettings()

    def _varied(self, recording: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        import numpy as np
        import torch

        # From torch's numbers, which follow the run's seed, in a worker its own. A run that goes on draws others than
        # one that was never stopped: a batch is made ahead of the step that a checkpoint is of.
        chance = np.random.default_rng(int(torch.randint(2**31, ()).item()))
        samples = vary_samples(_fitting(recording), SAMPLING_RATE, self.augment, chance, speed=False)
        spectrum, mask = self._of(samples)
        masked = mask_features(spectrum[0].numpy(), int(mask.sum()), self.augment, chance)
        return torch.from_numpy(masked)[None], mask

    def checked(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A row of the two documents that are the shortest among the first rows, or of the only one; see
        :attr:`ft_core.plugins.ModalitySpec.collator`."""
        found = [one for number in range(min(len(rows), LOOKED_AT)) for one in _documents(rows[number])]
        taken = sorted(found, key=lambda one: len(one["input_ids"]))[:2]
        joined = {name: [value for one in taken for value in one[name]] for name in ("input_ids", "labels", RECORDINGS)}
        return joined | {"seq_lengths": [len(one["input_ids"]) for one in taken]}

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """See :meth:`ft_core.data.Collator.batch_tokens`."""
        return self.text.batch_tokens(lengths)


def _documents(feature: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The documents of a row, each with its recording."""
    ids, labels = iter(feature["input_ids"]), iter(feature["labels"])
    lengths = feature.get("seq_lengths") or [len(feature["input_ids"])]
    for length, recording in zip(lengths, feature[RECORDINGS], strict=True):
        yield {
            "input_ids": list(islice(ids, length)),
            "labels": list(islice(labels, length)),
            RECORDINGS: [recording],
        }


def _fitting(recording: Mapping[str, Any]) -> Any:
    """A recording's samples, as many as its tokens were counted by: resampling is a sample off at times."""
    import numpy as np

    wanted = recording["samples"]
    try:
        samples = open_row(recording, SAMPLING_RATE)
    except (AudioError, DataError) as error:
        raise UnusableAudio(f"{error} (mend it, and go on; stt.on_bad_audio: skip leaves such rows out)") from error
    off = len(samples) - wanted
    if abs(off) > OFF * SAMPLING_RATE:
        raise UnusableAudio(
            f"{audio_name(recording['audio'])}: has {len(samples) / SAMPLING_RATE:.2f} s, and had "
            f"{wanted / SAMPLING_RATE:.2f} s when the training began, or by its header (put it back as it was, or "
            "train anew; a file whose header is wrong: write it anew)"
        )
    return samples[:wanted] if off >= 0 else np.pad(samples, (0, -off))


def collator(job: Job) -> AsrCollator:
    """The collator of a training; see :attr:`ft_core.plugins.ModalitySpec.collator`. Batches are made in workers."""
    from ft_core.fast import fast_path_of
    from ft_core.training.sft import MIXES

    settings = settings_of(job.config)
    workers = settings.workers
    if workers is None:
        workers = 0 if job.arguments["use_cpu"] else WORKERS
    job.arguments["dataloader_num_workers"] = workers
    padding_free = packs(job.model, job.processor)
    if not padding_free:
        job.say(MIXES)
    lengths = padding_free and fast_path_of(job.model) is not None
    text = Collator(job.tokenizer.pad_token_id, padding_free=padding_free, lengths=lengths)
    return replace(collator_for(job.model, job.processor, text), augment=settings.augment)


def collator_for(model: Any, processor: Any, text: Collator) -> AsrCollator:
    """A collator for a model, its adapter attached or not."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return AsrCollator(text, processor, plain.get_submodule(f"model.{ENCODER[0]}.conv2d1").weight.dtype)


def packs(model: Any, processor: Any) -> bool:
    """Whether the model keeps documents with recordings in one row apart, by
    :func:`ft_core.data.keeps_documents_apart`."""
    collate = collator_for(model, processor, Collator(0))
    documents = drawn(processor, ((9, 0.3), (9, 0.3), (32, 0.6)), 0)
    return keeps_documents_apart(model, documents, collate)


def drawn(processor: Any, shapes: Sequence[tuple[int, float]], seed: int) -> list[dict[str, Any]]:
    """Documents to try a model with: a recording of noise between the words of the chat template, and random tokens.

    Args:
        processor: the model's.
        shapes: of each document how many random tokens follow, and how many seconds the recording has.
        seed: other documents for another.

    Returns:
        rows as the collator takes them; labels are -100 on all but the random tokens.
    """
    import numpy as np

    chance = np.random.default_rng(seed)
    tokenizer, renderer = processor.tokenizer, AsrRenderer(processor)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    usual = [token for token in range(len(tokenizer)) if token not in special]
    documents = []
    for words, seconds in shapes:
        samples = round(seconds * SAMPLING_RATE)
        noise = chance.normal(0, 0.1, samples).clip(-1, 1).astype(np.float32)
        heard = Heard(reference_of({"array": noise, "sampling_rate": SAMPLING_RATE}), None, None)
        renderer.samples[heard] = samples
        asked = tokenizer(renderer.question(heard), add_special_tokens=False)["input_ids"]
        said = [usual[i] for i in chance.integers(len(usual), size=words)]
        documents.append(
            {
                "input_ids": [*asked, *said],
                "labels": [*[IGNORE] * len(asked), *said],
                RECORDINGS: [{**heard._asdict(), "samples": samples, "varied": False}],
            }
        )
        assert asked.count(processor.audio_token_id) == audio_tokens(samples)
    return documents
