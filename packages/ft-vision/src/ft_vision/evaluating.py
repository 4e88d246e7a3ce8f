"""Measures a model that sees on held-out rows: its loss, answers to read, and how close they are to the expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ft_core.comparison import EXACT
from ft_core.data import Collator
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_core.evaluation import SHORT_ANSWER, Evaluation, EvaluationJob, Sample
from ft_core.text_metrics import Normalisation, anls, character_error_rate, exact_match, word_error_rate
from ft_vision.collating import VisionCollator, collator_for
from ft_vision.documents import IMAGES, VisionRenderer, fault_of, image_token_of, images_of, tokenize
from ft_vision.loading import settings_of
from ft_vision.rows import image_name

__all__ = ["evaluate"]


def evaluate(job: EvaluationJob) -> Evaluation:
    """Loss and perplexity over the trained tokens of ``job.rows``, each document for itself; and greedy answers.

    The loss is the mean negative log-likelihood per trained token (nats), accumulated in float64; perplexity is its
    exponential. Of answers, ``exact_match``, ``cer``, ``wer`` and ``anls`` are measured as :mod:`ft_core.text_metrics`
    has them, after what ``vision.ignore_case`` and ``vision.whitespace`` say; a row's ``answers`` are accepted beside
    the one that it ends with. Rows that are too long are left out of the loss, and where bad images are skipped, their
    rows of all.

    Raises:
        DataError: a row cannot be written, has an image that cannot be used, or none is left.
    """
    renderer = VisionRenderer(job.processor)
    tokens, bad = tokenize(
        job.rows,
        renderer,
        max_length=job.config.max_length,
        train_on=getattr(job.settings, "train_on", "answers"),
        on_bad_image=settings_of(job.config).on_bad_image,
    )
    if not len(tokens):
        raise DataError(f"none of the {len(job.rows)} held-out rows can be measured: too long, or with bad images")
    collate = collator_for(
        job.model, job.processor, Collator(job.tokenizer.pad_token_id, padding_free=False), job.config.model
    )
    taken = images_of(tokens, job.rows, renderer, image_token_of(job.model.config))
    total = 0.0
    for number, images in enumerate(taken):
        job.progress(number, len(tokens), "documents of the loss")
        total += _nll(job.model, collate([{**tokens[number], IMAGES: images}]))
    job.progress(len(tokens), len(tokens), "documents of the loss")
    loss = total / tokens.trained_tokens
    metrics: dict[str, float | None] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    answered = _answers(job, renderer, collate)
    metrics |= answered.metrics
    compared = answered.compared if answered.metrics else None
    return Evaluation(metrics, answered.samples, len(job.rows) - len(bad), answered.scored, compared)


def _nll(model: Any, batch: dict[str, Any]) -> float:
    """The sum of the negative log-likelihood of a document's trained tokens."""
    import torch

    targets = batch.pop("labels")[0, 1:]
    kept = (targets != IGNORE).nonzero()[:, 0]
    with torch.inference_mode():
        logits = model(**_on(model, batch), use_cache=False, logits_to_keep=kept.to(model.device)).logits[0]
        each = torch.nn.functional.cross_entropy(logits.float(), targets[kept].to(logits.device), reduction="none")
        return float(each.double().sum())


class Asked(NamedTuple):
    """A question: its row, its tokens, what was expected, and how many tokens that has."""

    row: Mapping[str, Any]
    ids: list[int]
    expected: str
    wanted: int


class Answered(NamedTuple):
    """Answers to read, what was measured on the first ``scored`` of them, and what made no difference in that."""

    samples: list[Sample]
    metrics: dict[str, float | None]
    scored: int
    compared: dict[str, Any]


def _answers(job: EvaluationJob, renderer: VisionRenderer, collate: VisionCollator) -> Answered:
    """Greedy answers, and how close they are to the expected ones.

    An answer that had to end before the expected one could is read and not scored.
    """
    settings = settings_of(job.config)
    compared: dict[str, Any] = {"ignore_case": settings.ignore_case, "whitespace": settings.whitespace}
    compared |= job.compared
    normalisation = Normalisation(**compared)
    asked, short = _questions(job, renderer)
    longest = job.max_new_tokens
    if asked and (short or job.whole_answers):
        most = max(one.wanted for one in asked)
        longest = min(most + 8, 2 * SHORT_ANSWER) if short else max(longest, most + most // 4 + 8)
    samples: list[Sample] = []
    scored: list[tuple[str, list[str]]] = []
    for number, one in enumerate(asked):
        job.progress(number, len(asked), "answers")
        answer = _answer(job, collate, one, longest)
        accepted = list(dict.fromkeys([one.expected, *one.row.get("answers", [])]))
        right = exact_match([answer], [accepted], normalisation)[0] if short else None
        samples.append(Sample(_asked(one.row), one.expected, answer, right))
        if one.wanted < longest:
            scored.append((answer, accepted))
    job.progress(len(asked), len(asked), "answers")
    if not scored:
        return Answered(samples, {}, 0, compared)
    answers, allowed = [answer for answer, _ in scored], [accepted for _, accepted in scored]
    exact = {EXACT: sum(exact_match(answers, allowed, normalisation)) / len(scored)}
    metrics: dict[str, float | None] = {
        "cer": character_error_rate(answers, allowed, normalisation),
        "wer": word_error_rate(answers, allowed, normalisation),
        "anls": anls(answers, allowed),
    }
    # The first is what a report begins with: long answers are seldom the same to the letter.
    return Answered(samples, {**exact, **metrics} if short else {**metrics, **exact}, len(scored), compared)


def _questions(job: EvaluationJob, renderer: VisionRenderer) -> tuple[list[Asked], bool]:
    """What is asked, and whether the expected answers are short."""
    found = []
    for row in job.rows:
        if all(image in renderer.sizes for image in row["images"]) and fault_of(row, renderer) is None:
            text, expected = renderer.prompt(row)
            if expected is not None:
                ids = job.tokenizer(text, add_special_tokens=False)["input_ids"]
                wanted = len(job.tokenizer(expected, add_special_tokens=False)["input_ids"])
                found.append(Asked(row, ids, expected, wanted))
    lengths = sorted(one.wanted for one in found)
    short = bool(lengths) and lengths[int(0.95 * (len(lengths) - 1))] <= SHORT_ANSWER
    return found[: job.answers if job.answers is not None else (len(found) if short else 16)], short


def _answer(job: EvaluationJob, collate: VisionCollator, one: Asked, longest: int) -> str:
    """The model's likeliest tokens, up to so many, as text."""
    import torch

    from ft_core.generation import stop_ids

    batch = collate([{"input_ids": one.ids, "labels": one.ids, IMAGES: one.row["images"]}])
    del batch["labels"]
    with torch.inference_mode():
        made = job.model.generate(
            **_on(job.model, batch),
            do_sample=False,
            use_cache=True,
            max_new_tokens=longest,
            eos_token_id=stop_ids(job.model, job.tokenizer),
            pad_token_id=job.tokenizer.pad_token_id,
        )
    return str(job.tokenizer.decode(made[0, len(one.ids) :], skip_special_tokens=True))


def _on(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) for name, value in batch.items()}


def _asked(row: Mapping[str, Any]) -> str:
    """What to show a person of a question: the last user's turn, its images by their names."""
    names = iter(row["images"])
    last = ""
    for message in row["messages"]:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = [part["text"] if part["type"] == "text" else f"[{image_name(next(names))}] " for part in parts]
        if message["role"] == "user":
            last = "".join(text)
    return last
