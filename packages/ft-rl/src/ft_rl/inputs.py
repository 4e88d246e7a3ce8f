"""What rows hold beside text, such as images: which methods can train on them, and how they come into their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.console import counted
from ft_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.config import TrainConfig
    from ft_core.evaluation import EvaluationJob
    from ft_core.fast.beside import Beside
    from ft_core.training import Job
    from ft_core.training.inputs import Inputs

__all__ = ["GIVEN", "NUMBER", "beside_of", "check_inputs", "first_batch", "inputs_of", "prepare_inputs", "usable_rows"]

GIVEN = "given"
"""The column of a trainer's rows with their references."""
NUMBER = "row"
"""The column of a trainer's rows, and the key of a batch, with the numbers of rows that the trainer holds."""
KEPT = "inputs"
"""The name by which a job keeps its inputs."""
SHOWN = 3
"""Rows that are left out and named, each in a line."""


def inputs_of(job: Job | EvaluationJob) -> Inputs | None:
    """What sees to the images of a job's rows; None where its task is text."""
    from ft_core.training.modality import of_modality

    if KEPT not in job.kept:
        make = of_modality(job.config, "inputs")
        job.kept[KEPT] = None if make is None else make(job.config, job.model, job.processor)
    found: Inputs | None = job.kept[KEPT]
    return found


def prepare_inputs(job: Job) -> Inputs | None:
    """:func:`inputs_of` for a training, whose model ft's layers have to score.

    Raises:
        ConfigError: they cannot.
    """
    from ft_rl.policy import check_layers

    inputs = inputs_of(job)
    if inputs is not None:
        check_layers(job.model, job.config.method)
    return inputs


def check_inputs(config: TrainConfig) -> None:
    """Refuse what reads text alone, for a task whose rows hold more; before anything is loaded.

    Raises:
        ConfigError: an engine, an environment or a reward that does.
    """
    from ft_core.config.load import method_settings
    from ft_core.training.modality import of_modality

    if of_modality(config, "inputs") is None:
        return
    method, task, settings = config.method, config.task, method_settings(config)
    engine = getattr(settings, "engine", ("transformers", {}))[0]
    if engine != "transformers":
        raise ConfigError(
            f"{method}.rollouts: the engine {engine!r} writes from text alone, not with task: {task} "
            "(allowed: transformers)"
        )
    if getattr(settings, "environment", None) is not None:
        raise ConfigError(f"{method}.environment: is of text alone, not to be had with task: {task}; remove the key")
    for number, entry in enumerate(config.rewards or ()):
        if entry.name == "reward-model":
            raise ConfigError(f"rewards.{number}: reward-model reads text alone, not to be had with task: {task}")
        columns = entry.settings.get("columns")
        if entry.name == "http" and (columns is None or "images" in columns):
            raise ConfigError(
                f"rewards.{number}.columns: images cannot be sent: name the columns to send, without them"
            )


def usable_rows(job: Job | EvaluationJob, inputs: Inputs | None, rows: Sequence[Any], name: str) -> list[int]:
    """The numbers of rows whose images can be used; those that are left out are named and counted.

    Args:
        name: ``train`` or ``held_out``.

    Raises:
        DataError: an image cannot be used and is not to be skipped; or no row is left.
    """
    if inputs is None:
        return list(range(len(rows)))
    numbers, bad = inputs.usable(rows)
    what = name.replace("_", "-")
    for line in bad[:SHOWN]:
        job.say(f"left out: {what} {line}")
    if len(bad) > SHOWN:
        job.say(f"left out: {counted(len(bad), f'{what} row')} in all with an image that cannot be used")
    if not numbers:
        raise DataError(f"none of {counted(len(rows), f'{what} row')} has images that can be used")
    return numbers


def beside_of(
    inputs: Inputs, given: Sequence[Sequence[str]]
) -> Callable[[Sequence[int], Tensor, Tensor], Beside | None]:
    """What some of many rows hold beside text, by the rows' numbers and the batch's ids and mask ``[B, L]``.

    Args:
        given: each row's references.
    """

    def made(numbers: Sequence[int], ids: Tensor, mask: Tensor) -> Beside | None:
        return inputs.beside([given[number] for number in numbers], ids, mask)

    return made


def first_batch(inputs: Inputs, ids: Sequence[int], given: Sequence[str]) -> dict[str, Any]:
    """One row as a batch with labels, by which the fast layers are checked.

    Tokens that stand for what is beside the text are never labels: nothing learns them, and a family may number them
    past the rows of its head.
    """
    import torch

    from ft_core.data.collating import IGNORE

    row = torch.tensor([list(ids)])
    labels = torch.tensor([[IGNORE if token in inputs.never else token for token in ids]])
    beside = inputs.beside([given], row, torch.ones_like(row))
    more = {} if beside is None else beside.padded(torch.arange(row.shape[1])[None])
    return {"input_ids": row, "labels": labels, "use_cache": False, **more}
