"""Measures a model on held-out rows: loss, perplexity, and exact match where answers are short; before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft_core.comparison import EXACT, compare, table
from ft_core.data.collating import IGNORE
from ft_core.errors import RunError
from ft_core.text_metrics import Normalisation, exact_match

if TYPE_CHECKING:
    from pydantic import BaseModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ft_core.config import TrainConfig
    from ft_core.runs import Run

__all__ = ["Evaluation", "EvaluationJob", "Sample", "compare", "evaluate", "evaluate_answers", "table"]

SHORT_ANSWER = 32
"""Exact match is measured where at least 95 % of the expected answers have at most this many tokens."""

TOKENS_AT_ONCE = 2048
"""Loss is measured over so many tokens at a time, padding counted, or over one row: logits are the largest tensor."""


@dataclass
class Sample:
    """One answer: what was asked, what was expected (or None), and what the model said.

    ``right`` says whether the answer is an accepted one, where that is known better than by comparing the two.
    """

    prompt: str
    expected: str | None
    answer: str
    right: bool | None = None


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        metrics: numbers by name, in the order to show them; None where one could not be measured.
        samples: answers to read, the first rows' first.
        rows: how many rows were measured.
        answers: how many answers those of the metrics that are of answers were measured on; None: on all samples.
        compared: what made no difference between an answer and the expected one, in the words of the configuration.
    """

    metrics: dict[str, float | None]
    samples: list[Sample]
    rows: int
    answers: int | None = None
    compared: dict[str, Any] | None = None


@dataclass
class EvaluationJob:
    """What a method's ``evaluate(job) -> Evaluation`` is handed.

    Attributes:
        config: the run's configuration.
        settings: the method's own section.
        model: the model to measure, in evaluation mode.
        tokenizer: its tokenizer.
        rows: held-out rows in normal form.
        answers: how many rows to answer by generation (None: all where answers are short, else 16).
        max_new_tokens: the longest answer to generate where it isn't known from the expected ones.
        progress: called with (done, total, what) as the work goes on.
        kept: what the method keeps from one measurement to the next of the same job, by names of its own: that of the
            training (:attr:`ft_core.training.Job.kept`), or of all that ``ft eval`` measures.
        say: prints one line; ``ft eval`` has it on stderr, since stdout is for what was measured.
        processor: as :attr:`ft_core.training.Job.processor`.
        whole_answers: whether long answers too are generated to the length of the expected ones, where that is known,
            rather than to ``max_new_tokens``. ``ft eval`` wants it, for which a training would have to wait.
        compared: fields of :class:`ft_core.text_metrics.Normalisation` that whoever asks for the measurement has set.
    """

    config: TrainConfig
    settings: BaseModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[dict[str, Any]]
    answers: int | None = None
    max_new_tokens: int = 128
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)
    kept: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print
    processor: Any = None
    whole_answers: bool = False
    compared: Mapping[str, Any] = field(default_factory=dict)


def evaluate_answers(job: EvaluationJob) -> Evaluation:
    """Loss and perplexity over the trained tokens of ``job.rows``, and exact match where answers are short.

    The loss is the mean negative log-likelihood per trained token (nats), accumulated in float64; perplexity is its
    exponential. Exact match compares the answer with the expected one, white space at both ends apart, or as
    ``job.compared`` says.

    Raises:
        RunError: the memory is too small for a row.
    """
    from ft_core.data import tokenize_rows
    from ft_core.memory import enough_memory

    train_on: Literal["answers", "all"] = getattr(job.settings, "train_on", "answers")
    tokenized = tokenize_rows(job.rows, job.tokenizer, max_length=job.config.max_length, train_on=train_on)
    ids, labels = tokenized.input_ids, tokenized.labels
    nll = [0.0] * len(ids)
    batches = list(_by_tokens(ids))
    for done, batch in enumerate(batches):
        job.progress(done, len(batches), "batches of the loss")
        longest = len(ids[batch[0]])
        with enough_memory(f"the loss of rows of {longest} tokens", "lower max_length, or free memory others hold"):
            sums = _nll(job.model, [ids[i] for i in batch], [labels[i] for i in batch])
        for i, value in zip(batch, sums, strict=True):
            nll[i] = value
    job.progress(len(batches), len(batches), "batches of the loss")
    tokens = tokenized.trained_tokens
    loss = math.fsum(nll) / tokens if tokens else None
    metrics: dict[str, float | None] = {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
    }
    samples, exact = _answers(job)
    if exact is not None:
        metrics[EXACT] = exact
    compared = _compared(job) if job.compared and exact is not None else None
    return Evaluation(metrics, samples, len(job.rows), compared=compared)


def _compared(job: EvaluationJob) -> dict[str, Any]:
    return {"ignore_case": False, "whitespace": "strip", **job.compared}


def _by_tokens(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices in batches of up to TOKENS_AT_ONCE tokens, padding counted, the longest rows first."""
    batch: list[int] = []
    for index in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
        if batch and (len(batch) + 1) * len(ids[batch[0]]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _nll(model: PreTrainedModel, ids: list[list[int]], labels: list[list[int]]) -> list[float]:
    """The sum of the negative log-likelihood of each row's trained tokens; rows are padded on the right."""
    import inspect

    import torch

    longest = max(map(len, ids))
    device = model.device
    x = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros_like(x)
    y = torch.full((len(ids), longest - 1), IGNORE)
    for i, (row, target) in enumerate(zip(ids, labels, strict=True)):
        x[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        y[i, : len(row) - 1] = torch.tensor(target[1:])
    columns = (y != IGNORE).any(0).nonzero()[:, 0]
    y = y[:, columns].to(device)
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.inference_mode():
        inputs = {"input_ids": x.to(device), "attention_mask": mask.to(device), "use_cache": False}
        if "logits_to_keep" in inspect.signature(plain.forward).parameters:
            logits = model(**inputs, logits_to_keep=columns.to(device)).logits
        else:
            logits = model(**inputs).logits
        if logits.shape[1] != len(columns):  # all of them, whether or not the model was told which are needed
            logits = logits[:, columns.to(device)]
        # Row by row: a cast of all logits to 32 bits would double the peak.
        return [
            float(torch.nn.functional.cross_entropy(row[kept].float(), target[kept], reduction="none").double().sum())
            for row, target, kept in zip(logits, y, y != IGNORE, strict=True)
        ]


def _answers(job: EvaluationJob) -> tuple[list[Sample], float | None]:
    from ft_core.data import render_prompt
    from ft_core.fast import forget
    from ft_core.generation import encode_prompt, generate_ids
    from ft_core.models.positions import positions

    asked = []
    for row in job.rows:
        prompt, expected = render_prompt(row, job.tokenizer)
        if expected is not None:
            asked.append((encode_prompt(prompt, job.tokenizer), prompt, expected))
    if not asked:
        return [], None
    lengths = sorted(len(job.tokenizer(e, add_special_tokens=False)["input_ids"]) for _, _, e in asked)
    short = lengths[int(0.95 * (len(lengths) - 1))] <= SHORT_ANSWER
    limit = job.answers if job.answers is not None else (len(asked) if short else 16)
    asked = asked[:limit]
    longest = min(lengths[-1] + 8, 2 * SHORT_ANSWER) if short else job.max_new_tokens
    # A prompt that fills the model's positions has no answer, which is not the expected one.
    most = positions(job.model.config)
    fitting = [i for i, (ids, _, _) in enumerate(asked) if ids and (most is None or len(ids) < most)]
    answers = [""] * len(asked)
    try:
        found = generate_ids(
            job.model,
            job.tokenizer,
            [asked[i][0] for i in fitting],
            max_new_tokens=longest,
            progress=lambda done, total: job.progress(done, total, "answers"),
        )
    finally:
        forget(job.model)  # a training may want the memory
    for i, answer in zip(fitting, found, strict=True):
        answers[i] = answer
    samples = [
        Sample(_last_turn(prompt, row), expected, answer)
        for (_, prompt, expected), answer, row in zip(asked, answers, _with_answers(job.rows), strict=False)
    ]
    if not (short and samples):
        return samples, None
    right = exact_match(answers, [[expected] for _, _, expected in asked], Normalisation(**_compared(job)))
    if job.compared:  # or a reader of the samples would see for himself
        samples = [replace(sample, right=one) for sample, one in zip(samples, right, strict=True)]
    return samples, sum(right) / len(right)


def _with_answers(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if "messages" in row or "completion" in row)


def _last_turn(prompt: str, row: dict[str, Any]) -> str:
    """What to show a person of a prompt: the last thing that was asked, without the template's markers."""
    turns = [m for m in row.get("messages", []) if m.get("role") == "user"]
    return str(turns[-1]["content"]) if turns else prompt


def evaluate(
    run: str | Path,
    *,
    data: str | None = None,
    limit: int | None = None,
    answers: int | None = None,
    compared: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure a run before (its base model) and after training, write ``evaluation.json`` and the report, return both.

    What ``limit`` or ``answers`` leave incomplete does not replace a measurement of other data, more rows or more
    answers: it is written beside it, to ``evaluation-partial.json``, and the report stays.

    Args:
        run: the run folder.
        data: rows to measure on; unset means the rows that the run kept from training.
        limit: at most this many rows.
        answers: at most this many generated answers.
        compared: what makes no difference between answers, instead of what the run's configuration says: fields of
            :class:`ft_core.text_metrics.Normalisation`.
        say: prints one line.
        progress: called with (done, total, what).

    Raises:
        RunError: no such run, not finished, or nothing held out and no ``data``.
        DataError: ``data`` cannot be read.
    """
    import copy

    from ft_core.config.load import method_settings
    from ft_core.data import read_rows
    from ft_core.models import find_model, load_base, load_run
    from ft_core.plugins import MethodSpec, registry
    from ft_core.report import write_report
    from ft_core.runs import Run, write_json
    from ft_core.training.modality import measure_of, of_modality
    from ft_core.training.prepare import prepare_processor

    folder = Run.open(run)
    config = folder.config
    spec = registry().get(MethodSpec, config.method)
    if data is not None:
        rows = list(read_rows(data, spec.formats, seed=config.training.seed, form=of_modality(config, "rows")))
        name = str(data)
    else:
        rows = folder.held_out()
        name = folder.HELD_OUT
        if not rows:
            raise RunError(f"{folder.path} kept no rows for evaluation: give some with --data FILE")
    total = len(rows)
    rows = rows[:limit] if limit else rows
    measure = measure_of(config, spec)
    kept: dict[str, Any] = {}

    def job(model: Any, tokenizer: Any) -> EvaluationJob:
        settings = method_settings(config)
        made = EvaluationJob(config, settings, model, tokenizer, rows, answers=answers, kept=kept, say=say)
        made.compared = compared or {}
        made.processor, made.whole_answers = prepare_processor(config, find_model(config.model), tokenizer), True
        if progress:
            made.progress = progress
        return made

    _standing(folder, say)  # what is wrong with it is said before anything is measured
    model, tokenizer = load_run(folder, say=say)
    if folder.adapter.is_dir() and config.lora.bias == "none":  # PEFT leaves trained biases on when it is disabled
        with model.disable_adapter():
            before = copy.deepcopy(measure(job(model, tokenizer)))
        after = measure(job(model, tokenizer))
    else:
        after = measure(job(model, tokenizer))
        del model
        model, tokenizer = load_base(folder, say=say)
        before = measure(job(model, tokenizer))
    comparison = compare(before, after, name)
    cut = len(rows) < total or (answers is not None and len(comparison["samples"]) == answers < len(rows))
    if cut and _less(comparison, _standing(folder)):
        path = folder.path / folder.PARTIAL
        write_json(path, comparison)
        say(f"written to {path}: {folder.EVALUATION} holds a fuller measurement, or one of other data, and stays")
        return comparison
    write_json(folder.path / folder.EVALUATION, comparison)
    write_report(folder.path)
    say(f"written to {folder.path / folder.EVALUATION} and {folder.path / folder.REPORT}")
    return comparison


def _standing(folder: Run, say: Callable[[str], None] | None = None) -> dict[str, Any] | None:
    """The measurement that a run holds; None if there is none, or none that can be read, which is said in one line."""
    try:
        known = folder.evaluation()
        if known is not None:
            metrics = known.get("metrics", {})
            counts = [known.get(name) or 0 for name in ("rows", "answers")]
            values = metrics.values() if isinstance(metrics, dict) else [None]
            if not all(isinstance(v, dict) for v in values) or not all(isinstance(c, int) for c in counts):
                raise RunError(f"{folder.path / folder.EVALUATION} cannot be read: it holds no measurement")
    except RunError as error:
        if say is not None:
            say(f"{error}; taken for none")
        return None
    return known


def _less(found: dict[str, Any], known: dict[str, Any] | None) -> bool:
    """Whether a measurement that stands is of other data, of more rows or of more answers."""
    measured = (known or {}).get("metrics", {}).values()
    if known is None or all(values.get("after") is None for values in measured):
        return False
    more = any((known.get(name) or 0) > found.get(name, 0) for name in ("rows", "answers"))
    return more or known.get("data") != found["data"]
