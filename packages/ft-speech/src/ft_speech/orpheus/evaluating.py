"""Measures a language model that speaks on held-out rows: its loss on their sound, and how it speaks their texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ft_core.data import Tokenized
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_core.evaluation import Evaluation, EvaluationJob, Sample
from ft_core.text_metrics import Normalisation
from ft_speech.listening.recordings import SAID
from ft_speech.orpheus.documents import CODES, Documents, documents
from ft_speech.orpheus.loading import settings_of
from ft_speech.orpheus.speaking import OrpheusSpeaker
from ft_speech.references import open_row
from ft_speech.speaking.spoken import Spoken, measured

__all__ = ["evaluate"]

SPOKEN = 16
"""Rows that are spoken, where nothing else is said."""
LONGER = 2.0
"""Speech is cut at so many times the recording's length and a second: what goes on is wrong long before."""

Row = Mapping[str, Any]


def evaluate(job: EvaluationJob) -> Evaluation:
    """Loss over the tokens of sound of ``job.rows``; and of what the model speaks of their texts ``mcd`` and, where
    ``tts.recogniser`` is given, ``wer`` and ``cer``.

    The loss is the mean negative log-likelihood per trained token (nats), accumulated in float64, each document for
    itself; perplexity is its exponential. What is spoken is drawn as ``ft speak`` draws it where nothing else is said,
    with the seed 0; see :func:`ft_speech.speaking.spoken.measured` for what is measured of it.

    Raises:
        DataError: a row cannot be written, has a recording that cannot be used, or none is left.
    """
    settings = settings_of(job.config)
    processor = job.processor
    kept = job.kept.setdefault(CODES, {})
    found = documents(job.rows, processor, settings, max_length=job.config.max_length, kept=kept, show=False)
    if not job.kept.get(SAID):  # the data set of a training has, or the measurement before this one
        for line in found.left_out("held-out", settings, job.config.max_length):
            job.say(line)
        job.kept[SAID] = True
    if not len(found.tokens):
        raise DataError(f"none of the {len(job.rows)} held-out rows can be measured: too long, or with bad recordings")
    loss = _loss(job, found.tokens)
    metrics: dict[str, float | None] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    spoken = _spoken(job, found)
    also = Normalisation(**job.compared) if job.compared else None
    of_speech, heard = measured(
        spoken, int(processor.codec.sample_rate), settings, kept=job.kept, also=also, progress=job.progress
    )
    samples = []
    for number, one in enumerate(spoken):
        lasted = f"[{len(one.samples) / processor.codec.sample_rate:.1f} s{', cut' if one.cut else ''}]"
        said = lasted if heard is None else f"{heard[number]} {lasted}".strip()
        samples.append(Sample(str(one.row["text"]), None if heard is None else str(one.row["text"]), said))
    return Evaluation({**of_speech, **metrics}, samples, len(found.tokens), len(spoken), dict(job.compared) or None)


def _spoken(job: EvaluationJob, found: Documents) -> list[Spoken]:
    """The first rows' texts as the model speaks them."""
    numbers = list(dict.fromkeys(found.tokens.row_of))[: SPOKEN if job.answers is None else job.answers]
    speaker = OrpheusSpeaker(job.model, job.processor)
    codec = job.processor.codec
    made = []
    for done, number in enumerate(numbers):
        job.progress(done, len(numbers), "texts spoken")
        row = job.rows[number]
        recorded = open_row(row, codec.sample_rate, trim_silence=settings_of(job.config).trim_silence)
        pieces = speaker.speak(
            str(row["text"]),
            voice=row.get("voice"),
            style=row.get("style"),
            max_seconds=min(LONGER * len(recorded) / codec.sample_rate + 1, settings_of(job.config).max_seconds),
        )
        samples = np.concatenate([np.zeros(0, np.float32), *pieces])
        made.append(Spoken(row, samples, recorded, speaker.cut))
    job.progress(len(numbers), len(numbers), "texts spoken")
    return made


def _loss(job: EvaluationJob, tokens: Tokenized) -> float:
    import torch

    total = []
    for number in range(len(tokens)):
        job.progress(number, len(tokens), "documents of the loss")
        one = tokens[number]
        ids, labels = (torch.tensor([one[name]], device=job.model.device) for name in ("input_ids", "labels"))
        targets = labels[0, 1:]
        kept = (targets != IGNORE).nonzero()[:, 0]
        with torch.inference_mode():
            logits = job.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
            each = torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="none")
            total.append(float(each.double().sum()))
    job.progress(len(tokens), len(tokens), "documents of the loss")
    return math.fsum(total) / tokens.trained_tokens
