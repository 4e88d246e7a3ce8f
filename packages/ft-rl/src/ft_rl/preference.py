"""What the methods that train on pairs have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError
from ft_rl.pairs import Pairs, show, tokenize_pairs

if TYPE_CHECKING:
    from ft_core.evaluation import EvaluationJob, Sample
    from ft_core.training import Job

__all__ = ["pair_samples", "pairs_dataset", "say_dropout", "shown", "too_long"]


def pairs_dataset(job: Job, rows: Sequence[dict[str, Any]], name: str) -> Any:
    """Pairs with the columns ``chosen_ids``, ``rejected_ids`` and ``prompt_length``; over-long ones are left out.

    Raises:
        DataError: the rows cannot be tokenized, or none is short enough.
    """
    from datasets import Dataset

    what = name.replace("_", "-")
    pairs = tokenize_pairs(rows, job.tokenizer, max_length=job.config.max_length)
    job.counts |= {f"{name}_tokens": pairs.tokens}
    if name == "train":
        job.counts |= {"overlong_rows": pairs.overlong}
    if not pairs.rows:
        raise too_long(len(rows), what, job.config.max_length)
    if pairs.overlong:
        job.say(
            f"{pairs.overlong} of {len(rows)} {what} pairs {'is' if pairs.overlong == 1 else 'are'} longer than "
            f"max_length {job.config.max_length}: left out"
        )
    columns = {
        "chosen_ids": pairs.chosen_ids, "rejected_ids": pairs.rejected_ids, "prompt_length": pairs.prompt_lengths,
    }  # fmt: skip
    return Dataset.from_dict(columns)


def pair_samples(job: EvaluationJob, pairs: Pairs, answer: Callable[[int], str]) -> list[Sample]:
    """The first pairs to read, each with what ``answer`` says of the pair at its position."""
    from ft_core.evaluation import Sample

    samples: list[Sample] = []
    for i, row in enumerate(pairs.rows[: 16 if job.answers is None else job.answers]):
        prompt = show(job.rows[row].get("prompt"))
        # Samples before and after are matched by their prompt, so it has to be there and one of a kind.
        if not prompt or any(sample.prompt == prompt for sample in samples):
            prompt = f"{prompt} (pair {row + 1})".lstrip()
        samples.append(Sample(prompt, show(job.rows[row]["chosen"]), answer(i)))
    return samples


def say_dropout(job: Job, disabled: bool) -> None:
    """Say so where a method switches off the dropout that the configuration asks for."""
    if disabled and job.config.lora is not None and job.config.lora.dropout > 0:
        job.say(f"{job.config.method}.disable_dropout switches lora.dropout off too")


def shown(job: EvaluationJob, what: str) -> Callable[[int, int], None]:
    """What tells an evaluation's progress, by its name."""
    return lambda done, total: job.progress(done, total, what)


def too_long(count: int, what: str, max_length: int | None) -> DataError:
    """The error for data of which nothing is short enough."""
    return DataError(f"all {count} {what} pairs are longer than max_length {max_length}: raise max_length")
