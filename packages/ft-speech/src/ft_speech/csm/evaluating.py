"""Measures a CSM on held-out rows: the losses of its backbone and its depth decoder, and how it speaks their texts."""

from __future__ import annotations

import math

import numpy as np

from ft_core.errors import DataError
from ft_core.evaluation import Evaluation, EvaluationJob, Sample
from ft_core.text_metrics import Normalisation
from ft_speech.csm.collating import CsmCollator, codes_in, inputs_of
from ft_speech.csm.documents import CODES, KINDS, Documents, make, say_left_out
from ft_speech.csm.encoding import Encoder
from ft_speech.csm.loading import plain
from ft_speech.csm.settings import tts_of
from ft_speech.csm.speaking import CsmSpeaker
from ft_speech.csm.turns import number_speakers, read_speakers, voices_of, write_speakers
from ft_speech.listening.recordings import SAID
from ft_speech.references import open_row
from ft_speech.speaking.spoken import Spoken, measured

__all__ = ["evaluate"]

SPOKEN = 16
"""Rows that are spoken, where nothing else is said."""
LONGER = 2.0
"""Speech is cut at so many times the recording's length and a second: what goes on is wrong long before."""
SPEAKERS = "csm_speakers"
"""The key of what a job keeps that holds the numbers of the voices of the run that was measured before its base."""


def evaluate(job: EvaluationJob) -> Evaluation:
    """The mean negative log-likelihood of a code (nats) in held-out rows: ``backbone_loss`` of those of the first
    codebook, ``depth_decoder_loss`` of the others, ``loss`` the sum of the two, as in training; over all frames, those
    that end the speech included, each document for itself, accumulated in float64. And of what the model speaks of the
    first rows' texts ``mcd`` and, where ``tts.recogniser`` is given, ``wer`` and ``cer``; see
    :func:`ft_speech.speaking.spoken.measured`. It is drawn as ``ft speak`` draws it where nothing else is said.

    Raises:
        DataError: as :func:`ft_speech.csm.documents.make`; or no row is left.
    """
    encoder, speakers = Encoder(job.model, job.kept, tts_of(job.config).trim_silence), read_speakers(job.tokenizer)
    if not speakers:  # a base knows no names: it has those of the run, which is measured first, or any will do
        speakers = job.kept.get(SPEAKERS) or number_speakers(voices_of(job.rows), tts_of(job.config).csm, {})
        write_speakers(job.tokenizer, speakers)
    job.kept[SPEAKERS] = speakers
    made = make(
        job.rows, job.model, job.tokenizer, encoder, max_length=job.config.max_length,
        speakers=speakers, max_seconds=tts_of(job.config).max_seconds, on_bad_audio=tts_of(job.config).on_bad_audio,
    )  # fmt: skip
    if not job.kept.get(SAID):  # the data set of a training has, or the measurement before this one
        say_left_out(job, made, "held-out")
        job.kept[SAID] = True
    if not made.documents:
        raise DataError(
            f"none of the {len(job.rows)} held-out rows can be measured: {made.overlong} longer than max_length "
            f"{job.config.max_length}, {len(made.bad)} with a recording that cannot be used"
        )
    spoken = _spoken(job, made, encoder)
    also = Normalisation(**job.compared) if job.compared else None
    of_speech, heard = measured(
        spoken, encoder.rate, tts_of(job.config), kept=job.kept, also=also, progress=job.progress
    )
    samples = []
    for number, one in enumerate(spoken):
        lasted = f"[{len(one.samples) / encoder.rate:.1f} s{', cut' if one.cut else ''}]"
        said = lasted if heard is None else f"{heard[number]} {lasted}".strip()
        samples.append(Sample(str(one.row["text"]), None if heard is None else str(one.row["text"]), said))
    metrics = {**of_speech, **_losses(job, made)}
    return Evaluation(metrics, samples, len(made.documents), len(spoken), dict(job.compared) or None)


def _spoken(job: EvaluationJob, made: Documents, encoder: Encoder) -> list[Spoken]:
    """The first rows' texts as the model speaks them."""
    numbers = made.row_of[: SPOKEN if job.answers is None else job.answers]
    speaker, most = CsmSpeaker(job.model, job.tokenizer, encoder.trim_silence), tts_of(job.config).max_seconds
    found = []
    for done, number in enumerate(numbers):
        job.progress(done, len(numbers), "texts spoken")
        row = job.rows[number]
        recorded = open_row(row, encoder.rate, trim_silence=encoder.trim_silence)
        longest = min(LONGER * len(recorded) / encoder.rate + 1, most)
        pieces = speaker.speak(
            str(row["text"]), voice=row.get("voice"), max_seconds=longest, context=tuple(row.get("context") or ())
        )
        found.append(Spoken(row, np.concatenate([np.zeros(0, np.float32), *pieces]), recorded, speaker.cut))
    job.progress(len(numbers), len(numbers), "texts spoken")
    return found


def _losses(job: EvaluationJob, made: Documents) -> dict[str, float | None]:
    import torch

    codebooks = int(plain(job.model).config.num_codebooks)
    collate = CsmCollator(0, codebooks, padding_free=False)
    sums, counts = [0.0, 0.0], [0, 0]
    for number, document in enumerate(made.documents):
        job.progress(number, len(made.documents), "documents of the loss")
        row = {"input_ids": document.ids, KINDS: document.kinds, CODES: document.codes.reshape(-1).tolist()}
        batch = {name: value.to(job.model.device) for name, value in collate([row]).items()}
        with torch.inference_mode():
            outputs = job.model(**inputs_of(job.model, batch))
        count = codes_in(batch[KINDS], 1.0, codebooks)
        for i, loss in enumerate((outputs.backbone_loss, outputs.depth_decoder_loss)):
            sums[i] += float(loss) * count[i]
            counts[i] += count[i]
    job.progress(len(made.documents), len(made.documents), "documents of the loss")
    backbone, depth = (total / count for total, count in zip(sums, counts, strict=True))
    return {"loss": math.fsum((backbone, depth)), "backbone_loss": backbone, "depth_decoder_loss": depth}
