"""What the methods that train on pairs have in common, and what their evaluations share with the others'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError
from ft_rl.inputs import GIVEN, inputs_of, prepare_inputs, usable_rows
from ft_rl.pairs import Pairs, show, tokenize_pairs

if TYPE_CHECKING:
    from ft_core.evaluation import EvaluationJob, Sample
    from ft_core.training import Job

__all__ = ["asked_of", "pair_samples", "pairs_dataset", "samples_of", "say_dropout", "shown", "too_long"]

MOST = 16
"""Samples of an evaluation where nobody has said how many."""


def pairs_dataset(job: Job, rows: Sequence[dict[str, Any]], name: str) -> Any:
    """Pairs with the columns ``chosen_ids``, ``rejected_ids`` and ``prompt_length``; over-long ones are left out.

    With images there is a column :data:`ft_rl.inputs.GIVEN` with their references, too.

    Raises:
        DataError: the rows cannot be tokenized, none is short enough, or an image cannot be used.
        ConfigError: the rows hold images, and ft's layers cannot score the model.
    """
    from datasets import Dataset

    what, inputs = name.replace("_", "-"), prepare_inputs(job)
    among = usable_rows(job, inputs, rows, name)
    pairs = tokenize_pairs(rows, job.tokenizer, max_length=job.config.max_length, inputs=inputs, among=among)
    job.counts |= {f"{name}_tokens": pairs.tokens}
    if name == "train":
        job.counts |= {"overlong_rows": pairs.overlong}
    given = None if inputs is None else [list(rows[number][inputs.column]) for number in pairs.rows]
    if given is not None and name == "train":
        job.counts |= {"images": sum(map(len, given)), "bad_image_rows": len(rows) - len(among)}
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
    return Dataset.from_dict(columns if given is None else {**columns, GIVEN: given})


def pair_samples(job: EvaluationJob, pairs: Pairs, answer: Callable[[int], str]) -> list[Sample]:
    """The first pairs to read, each with what ``answer`` says of the pair at its position."""
    return samples_of(
        job,
        [asked_of(job, job.rows[row]) for row in pairs.rows],
        lambda i: f"pair {pairs.rows[i] + 1}",
        lambda i: show(job.rows[pairs.rows[i]]["chosen"]),
        answer,
    )


def asked_of(job: EvaluationJob, row: dict[str, Any]) -> Any:
    """A row's prompt, in which images are named."""
    inputs = inputs_of(job)
    return row.get("prompt") if inputs is None else inputs.named(row["prompt"], row[inputs.column])


def samples_of(
    job: EvaluationJob,
    prompts: Sequence[Any],
    name: Callable[[int], str],
    target: Callable[[int], str | None],
    answer: Callable[[int], str],
) -> list[Sample]:
    """The first prompts to read, as many as are wanted, each with its target and answer.

    Args:
        prompts: text or messages; None where there is none.
        name, target, answer: of the prompt at a position; the name tells it from one that reads the same.
    """
    from ft_core.evaluation import Sample

    samples: list[Sample] = []
    for i, given in enumerate(prompts[: MOST if job.answers is None else job.answers]):
        prompt = show(given)
        # Samples before and after are matched by their prompt, so it has to be there and one of a kind.
        if not prompt or any(sample.prompt == prompt for sample in samples):
            prompt = f"{prompt} ({name(i)})".lstrip()
        samples.append(Sample(prompt, target(i), answer(i)))
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
