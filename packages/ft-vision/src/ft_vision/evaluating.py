"""Measures a model that sees on held-out rows: its loss, answers to read, and exact match where they are short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ft_core.data import Collator
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_core.evaluation import EXACT, SHORT_ANSWER, Evaluation, EvaluationJob, Sample
from ft_vision.collating import VisionCollator, collator_for
from ft_vision.documents import IMAGES, VisionRenderer, image_token_of, images_of, tokenize
from ft_vision.loading import settings_of
from ft_vision.rows import image_name

__all__ = ["evaluate"]


def evaluate(job: EvaluationJob) -> Evaluation:
    """Loss and perplexity over the trained tokens of ``job.rows``, each document for itself; and greedy answers.

    The loss is the mean negative log-likelihood per trained token (nats), accumulated in float64; perplexity is its
    exponential. Exact match is as :func:`ft_core.evaluation.evaluate_answers` has it. Rows that are too long are left
    out of the loss, and where bad images are skipped, their rows of all.

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
    samples, exact = _answers(job, renderer, collate)
    if exact is not None:
        metrics[EXACT] = exact
    return Evaluation(metrics, samples, len(job.rows) - len(bad))


def _nll(model: Any, batch: dict[str, Any]) -> float:
    """The sum of the negative log-likelihood of a document's trained tokens."""
    import torch

    targets = batch.pop("labels")[0, 1:]
    kept = (targets != IGNORE).nonzero()[:, 0]
    with torch.inference_mode():
        logits = model(**_on(model, batch), use_cache=False, logits_to_keep=kept.to(model.device)).logits[0]
        each = torch.nn.functional.cross_entropy(logits.float(), targets[kept].to(logits.device), reduction="none")
        return float(each.double().sum())


def _answers(
    job: EvaluationJob, renderer: VisionRenderer, collate: VisionCollator
) -> tuple[list[Sample], float | None]:
    """Greedy answers, and the share that is right where the expected ones are short."""
    import torch

    from ft_core.generation import stop_ids

    asked = []
    for row in job.rows:
        if all(image in renderer.sizes for image in row["images"]):
            text, expected = renderer.prompt(row)
            ids = job.tokenizer(text, add_special_tokens=False)["input_ids"]
            wanted = len(job.tokenizer(expected or "", add_special_tokens=False)["input_ids"])
            asked.append((row, ids, expected, wanted))
    lengths = sorted(wanted for *_, wanted in asked)
    short = bool(lengths) and lengths[int(0.95 * (len(lengths) - 1))] <= SHORT_ANSWER
    asked = asked[: job.answers if job.answers is not None else (len(asked) if short else 16)]
    longest = min(lengths[-1] + 8, 2 * SHORT_ANSWER) if short else job.max_new_tokens
    samples: list[Sample] = []
    for number, (row, ids, expected, _) in enumerate(asked):
        job.progress(number, len(asked), "answers")
        batch = collate([{"input_ids": ids, "labels": ids, IMAGES: row["images"]}])
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
        answer = job.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        samples.append(Sample(_asked(row), expected, answer))
    job.progress(len(asked), len(asked), "answers")
    if not (short and samples):
        return samples, None
    return samples, sum(s.answer.strip() == (s.expected or "").strip() for s in samples) / len(samples)


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
