"""Measures a Whisper on held-out rows: its loss, what it writes down, and the error rates of that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_core.evaluation import Evaluation, EvaluationJob, Sample
from ft_core.text_metrics import Normalisation
from ft_speech.listening.metrics import word_and_character_errors
from ft_speech.listening.recordings import SAID, shown
from ft_speech.whisper.collating import WhisperCollator, workers_of
from ft_speech.whisper.documents import Examples, examples
from ft_speech.whisper.labels import Labels, labels_of
from ft_speech.whisper.loading import settings_of

__all__ = ["evaluate"]

AT_ONCE = 8
"""Recordings that are heard at a time."""
SPARE = 16
"""Tokens that an answer may have beyond twice those of the longest expected one, and is then cut: what goes round in
circles is wrong long before."""

Row = Mapping[str, Any]


def evaluate(job: EvaluationJob) -> Evaluation:
    """Loss over the labels of ``job.rows``, and WER and CER of greedy answers.

    The loss is the mean negative log-likelihood per label (nats), accumulated in float64. ``wer`` and ``cer`` are those
    of :func:`ft_speech.listening.metrics.word_and_character_errors`, after what ``stt.normalizer`` says. The model is
    told the language and the task of each row, writes no timestamps, and tries once, at temperature 0. Rows that are
    too long are left out.

    Raises:
        DataError: a row cannot be written or has a recording that cannot be used, or none is left.
    """
    settings = settings_of(job.config)
    labels = labels_of(job.model, job.processor, settings, job.config.model)
    positions = int(job.model.config.max_target_positions)
    found = examples(job.rows, labels, max_length=job.config.max_length, positions=positions, varied=False)
    if not job.kept.get(SAID):  # the data set of a training has, or the measurement before this one
        for line in found.left_out("held-out", labels.seconds):
            job.say(line)
        job.kept[SAID] = True
    if not found.rows:
        raise DataError(f"none of the {len(job.rows)} held-out rows can be measured: too long, or with bad recordings")
    asked = len(found.rows) if job.answers is None else min(job.answers, len(found.rows))
    total, answers = _measured(job, labels, found, asked)
    rows = [job.rows[number] for number in found.numbers[:asked]]
    expected = [str(row["text"]).strip() for row in rows]
    also = Normalisation(**job.compared) if job.compared else None
    languages = [labels.language(row) or "en" for row in rows]
    english = ["en" if labels.task(row) == "translate" else code for row, code in zip(rows, languages, strict=True)]
    spellings = getattr(job.tokenizer, "english_spelling_normalizer", None)
    rates = word_and_character_errors(
        answers, expected, english, normalizer=settings.normalizer, spellings=spellings, also=also
    )
    samples = [Sample(shown(row), text, said) for row, text, said in zip(rows, expected, answers, strict=True)]
    metrics: dict[str, float | None] = {**rates, "loss": total / found.tokens}
    compared = {"normalizer": settings.normalizer, **job.compared}
    return Evaluation(metrics, samples, len(found.rows), asked, compared)


def _measured(job: EvaluationJob, labels: Labels, found: Examples, asked: int) -> tuple[float, list[str]]:
    """The sum of the negative log-likelihoods of all labels, and what was written down of the first ``asked`` rows."""
    total, answers = [], []
    for number, batch in enumerate(_batches(job, found)):
        first = number * AT_ONCE
        job.progress(first, len(found.rows), "recordings")
        total.append(_nll(job.model, batch))
        rows = [job.rows[place] for place in found.numbers[first : first + AT_ONCE]][: max(0, asked - first)]
        if rows:
            answers += _written(job, labels, batch, rows)
    job.progress(len(found.rows), len(found.rows), "recordings")
    return math.fsum(total), answers


def _batches(job: EvaluationJob, found: Examples) -> Iterator[dict[str, Any]]:
    from torch.utils.data import DataLoader

    yield from DataLoader(
        found.rows,  # type: ignore[arg-type]
        batch_size=AT_ONCE,
        collate_fn=WhisperCollator(job.processor.feature_extractor, trim_silence=settings_of(job.config).trim_silence),
        num_workers=min(workers_of(job.config, on_cpu=job.model.device.type == "cpu"), len(found.rows) // AT_ONCE),
    )


def _nll(model: Any, batch: Mapping[str, Any]) -> float:
    import torch

    targets = batch["labels"].to(model.device)
    start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
    before = torch.cat([start, targets[:, :-1]], dim=1)
    before = before.masked_fill(before == IGNORE, model.config.pad_token_id)
    with torch.inference_mode():
        logits = model(input_features=_features(model, batch), decoder_input_ids=before, use_cache=False).logits
        # Row by row: a cast of all logits to 32 bits would double the peak.
        each = [
            torch.nn.functional.cross_entropy(row.float(), target, ignore_index=IGNORE, reduction="none")
            for row, target in zip(logits, targets, strict=True)
        ]
        return math.fsum(float(one.double().sum()) for one in each)


def _written(job: EvaluationJob, labels: Labels, batch: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What the model writes down of these rows, the first of a batch."""
    import torch

    model, answers = job.model, [""] * len(rows)
    features = _features(model, batch)
    most = int((batch["labels"][: len(rows)] != IGNORE).sum(1).max())
    longest = min(2 * most + SPARE, model.config.max_target_positions - 4)
    for task in dict.fromkeys(labels.task(row) for row in rows):
        places = [number for number, row in enumerate(rows) if labels.task(row) == task]
        told: dict[str, Any] = {}
        if labels.vocabulary.languages:
            told = {"language": [labels.language(rows[place]) for place in places], "task": task}
        with torch.inference_mode():
            made = model.generate(
                features[places], max_new_tokens=longest, num_beams=1, do_sample=False, return_timestamps=False, **told
            )
        for place, ids in zip(places, made, strict=True):
            answers[place] = str(job.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return answers


def _features(model: Any, batch: Mapping[str, Any]) -> Any:
    dtype = model.get_encoder().conv1.weight.dtype
    return batch["input_features"].to(model.device, dtype)
