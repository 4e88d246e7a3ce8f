"""Measures Qwen3-ASR on held-out rows: its loss, what it writes down, and how many words of that are wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ft_core.data import Collator
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_core.evaluation import Evaluation, EvaluationJob, Sample
from ft_core.text_metrics import Normalisation
from ft_speech.listening.metrics import word_and_character_errors
from ft_speech.listening.recordings import SAID, shown
from ft_speech.qwen_asr.collating import AsrCollator, collator_for
from ft_speech.qwen_asr.documents import RECORDINGS, AsrRenderer, Heard, heard_in, left_out, tokenize
from ft_speech.qwen_asr.loading import settings_of
from ft_speech.qwen_asr.parts import parsed

__all__ = ["answers_to", "evaluate"]

MORE = 1.25
"""An answer may have so many times the tokens of the longest that is expected, and a few more, before it is cut."""


class Asked(NamedTuple):
    """A row that is asked about: itself, its prompt's tokens, what is expected, and how many tokens that has."""

    row: Mapping[str, Any]
    ids: list[int]
    expected: str
    wanted: int


def evaluate(job: EvaluationJob) -> Evaluation:
    """Loss and perplexity over the trained tokens of ``job.rows``, each document for itself; WER and CER of answers.

    The loss is the mean negative log-likelihood per trained token (nats), accumulated in float64; perplexity is its
    exponential. Answers are greedy; the model finds the language out by itself. ``wer`` and ``cer`` are those of
    :func:`ft_speech.listening.metrics.word_and_character_errors`, by ``stt.normalizer``, over all rows that are asked
    about. Rows that are too long are left out of the loss, and where bad recordings are skipped, their rows of all.

    Raises:
        DataError: a row cannot be written, has a recording that cannot be used, or none is left.
    """
    settings = settings_of(job.config)
    renderer = AsrRenderer(job.processor, settings.language)
    tokens, bad = tokenize(
        job.rows,
        renderer,
        max_length=job.config.max_length,
        train_on=getattr(job.settings, "train_on", "answers"),
        on_bad_audio=settings.on_bad_audio,
    )
    if not job.kept.get(SAID):  # the data set of a training has, or the measurement before this one
        for line in left_out(tokens, bad, "held-out", job.config.max_length):
            job.say(line)
        job.kept[SAID] = True
    if not len(tokens):
        raise DataError(f"none of the {len(job.rows)} held-out rows can be measured: too long, or with bad recordings")
    collate = collator_for(job.model, job.processor, Collator(job.tokenizer.pad_token_id, padding_free=False))
    total = 0.0
    for number, row in enumerate(tokens.row_of):
        job.progress(number, len(tokens), "documents of the loss")
        recordings = [heard_in(job.rows[row], renderer)]
        total += _nll(job.model, collate([{**tokens[number], RECORDINGS: recordings}]))
    job.progress(len(tokens), len(tokens), "documents of the loss")
    loss = total / tokens.trained_tokens
    asked = _questions(job, renderer)
    said = [parsed(answer).text for answer in answers_to(job, collate, renderer, asked)]
    samples = [Sample(shown(one.row), one.expected, text) for one, text in zip(asked, said, strict=True)]
    metrics: dict[str, float | None] = {}
    if asked:
        also = Normalisation(**job.compared) if job.compared else None
        metrics |= word_and_character_errors(
            said,
            [one.expected for one in asked],
            [one.row.get("language") or settings.language for one in asked],
            normalizer=settings.normalizer,
            also=also,
        )
    metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    compared = {"normalizer": settings.normalizer, **job.compared}
    return Evaluation(metrics, samples, len(job.rows) - len(bad), len(asked), compared)


def _nll(model: Any, batch: dict[str, Any]) -> float:
    """The sum of the negative log-likelihood of a document's trained tokens."""
    import torch

    targets = batch.pop("labels")[0, 1:]
    kept = (targets != IGNORE).nonzero()[:, 0]
    given = {name: value.to(model.device) for name, value in batch.items()}
    with torch.inference_mode():
        logits = model(**given, use_cache=False, logits_to_keep=kept.to(model.device)).logits[0]
        each = torch.nn.functional.cross_entropy(logits.float(), targets[kept].to(logits.device), reduction="none")
        return float(each.double().sum())


def _questions(job: EvaluationJob, renderer: AsrRenderer) -> list[Asked]:
    """What is asked: all rows with a recording that can be used, or the first ``job.answers``."""
    found = []
    for row in job.rows:
        if Heard.of(row) in renderer.samples:
            text, expected = renderer.prompt(row)
            assert expected is not None
            ids = job.tokenizer(text, add_special_tokens=False)["input_ids"]
            wanted = len(job.tokenizer(renderer.answer(row), add_special_tokens=False)["input_ids"])
            found.append(Asked(row, ids, expected, wanted))
    return found if job.answers is None else found[: job.answers]


def answers_to(job: EvaluationJob, collate: AsrCollator, renderer: AsrRenderer, asked: Sequence[Asked]) -> list[str]:
    """The model's likeliest answers as it writes them, in batches of prompts of similar length."""
    from ft_core.generation import generate_ids

    if not asked:
        return []

    def inputs(batch: Sequence[int]) -> dict[str, Any]:
        rows = [asked[number] for number in batch]
        made = collate.left_padded([one.ids for one in rows])
        return made | collate.spectra([heard_in(one.row, renderer) for one in rows])

    longest = math.ceil(MORE * max(one.wanted for one in asked)) + 8
    return generate_ids(
        job.model,
        job.tokenizer,
        [one.ids for one in asked],
        max_new_tokens=longest,
        progress=lambda done, total: job.progress(done, total, "answers"),
        inputs=inputs,
    )
