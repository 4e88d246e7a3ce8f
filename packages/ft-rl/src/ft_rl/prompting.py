"""Prompts as a trainer's rows, those left out that leave no room for a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.errors import ConfigError, DataError
from ft_rl.grpo import WritingSettings
from ft_rl.inputs import NUMBER, inputs_of, usable_rows
from ft_rl.prompts import check_conversations, prompt_ids

if TYPE_CHECKING:
    from ft_core.training import Job
    from ft_core.training.inputs import Inputs

__all__ = ["ids_of", "prompts_dataset"]


def ids_of(
    row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any] | None, where: str, inputs: Inputs | None
) -> list[int]:
    """The tokens of a row's prompt, up to where an answer begins.

    Args:
        options: further arguments of the chat template. where: what an error names.
        inputs: sees to what the prompt holds beside text; None: it is text.

    Raises:
        DataError: as :func:`ft_rl.prompts.prompt_ids`.
    """
    if inputs is None:
        return prompt_ids(row["prompt"], tokenizer, options, where)
    try:
        return inputs.ids(row["prompt"], row[inputs.column], prompting=True, options=options)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def prompts_dataset(
    job: Job,
    rows: Sequence[dict[str, Any]],
    name: str,
    lengths: list[int] | None = None,
    seen: list[dict[str, Any]] | None = None,
) -> Any:
    """Prompts with all their columns; those that leave no room for a completion are left out.

    Prompts that hold more than text are rows of a number alone, under :data:`ft_rl.inputs.NUMBER`: that of ``seen``.

    Args:
        name: ``train`` or ``held_out``. lengths: gets the tokens of each prompt that stays.
        seen: gets the rows that stay, of prompts that hold more than text.

    Raises:
        ConfigError: no prompt could have room. DataError: none has, one is text where an environment takes turns, or an
            image cannot be used.
    """
    from datasets import Dataset

    settings, config = job.settings, job.config
    assert isinstance(settings, WritingSettings)
    if settings.environment is not None:
        check_conversations([row["prompt"] for row in rows], f"{config.method}.environment")
    room = config.max_length - settings.max_completion_length
    if room < 1:
        raise ConfigError(
            f"{config.method}.max_completion_length: {settings.max_completion_length} leaves no room for a prompt in "
            f"max_length {config.max_length}: raise max_length, or lower it"
        )
    inputs = inputs_of(job)
    among = usable_rows(job, inputs, rows, name)
    kept: list[dict[str, Any]] = []
    lengths = [] if lengths is None else lengths
    for number in among:
        row = rows[number]
        length = len(ids_of(row, job.tokenizer, settings.chat_template_kwargs, f"row {number + 1}", inputs))
        if length <= room:
            kept.append(row)
            lengths.append(length)
    what, dropped = name.replace("_", "-"), len(among) - len(kept)
    if not kept:
        raise DataError(
            f"all {len(among)} {what} prompts are longer than {room} tokens, max_length {config.max_length} less "
            f"{config.method}.max_completion_length {settings.max_completion_length}: raise max_length"
        )
    if dropped:
        verb = "is" if dropped == 1 else "are"
        job.say(f"{dropped} of {len(among)} {what} prompts {verb} longer than {room} tokens: left out")
    job.counts |= {f"{name}_tokens": sum(lengths), **({"overlong_rows": dropped} if name == "train" else {})}
    if inputs is None or seen is None:
        return Dataset.from_list(kept)
    if name == "train":
        images = sum(len(row[inputs.column]) for row in kept)
        job.counts |= {"images": images, "bad_image_rows": len(rows) - len(among)}
    columns = dict.fromkeys(column for row in kept for column in row)
    first = len(seen)
    seen += [{column: row.get(column) for column in columns} for row in kept]
    return Dataset.from_dict({NUMBER: list(range(first, len(seen)))})
