"""Measures a CSM on held-out rows: the losses of its backbone and its depth decoder over all frames."""

from __future__ import annotations

import math

from ft_core.errors import DataError
from ft_core.evaluation import Evaluation, EvaluationJob
from ft_speech.csm.collating import CsmCollator, codes_in, inputs_of
from ft_speech.csm.documents import CODES, KINDS, make
from ft_speech.csm.encoding import Encoder
from ft_speech.csm.loading import plain
from ft_speech.csm.settings import tts_of
from ft_speech.csm.turns import read_speakers

__all__ = ["evaluate"]


def evaluate(job: EvaluationJob) -> Evaluation:
    """The mean negative log-likelihood of a code (nats) in held-out rows: ``backbone_loss`` of those of the first
    codebook, ``depth_decoder_loss`` of the others, ``loss`` the sum of the two, as in training; over all frames, those
    that end the speech included, each document for itself, accumulated in float64.

    Raises:
        DataError: as :func:`ft_speech.csm.documents.make`; or no row is left.
    """
    import torch

    encoder = Encoder(job.model, job.kept)
    made = make(
        job.rows, job.model, job.tokenizer, encoder, max_length=job.config.max_length,
        speakers=read_speakers(job.tokenizer), on_bad_audio=tts_of(job.config).on_bad_audio,
    )  # fmt: skip
    if not made.documents:
        raise DataError(
            f"none of the {len(job.rows)} held-out rows can be measured: {made.overlong} longer than max_length "
            f"{job.config.max_length}, {len(made.bad)} with a recording that cannot be used"
        )
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
    metrics: dict[str, float | None] = {"loss": math.fsum((backbone, depth)), "backbone_loss": backbone}
    metrics["depth_decoder_loss"] = depth
    return Evaluation(metrics, [], len(made.documents))
