"""Completions of prompts that hold more than text: what TRL's GRPOTrainer is told of it, and what the model is handed.

TRL sees prompts of text, whose tokens it is given; what they hold beside it is named by the row's number in the batch,
and made where the model is asked for log-probabilities. So a rollout keeps no pixels, however many completions there
are of a prompt, nor does a checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ft_rl.collating import BESIDE
from ft_rl.inputs import NUMBER, beside_of, first_batch
from ft_rl.recording import RolloutRecords

if TYPE_CHECKING:
    from ft_core.training.inputs import Inputs

__all__ = ["GivenMixin"]


class GivenMixin(RolloutRecords):
    """Put it before :class:`ft_rl.recording.RolloutRecords`; without ``inputs`` it changes nothing.

    Attributes:
        inputs: sees to what rows hold beside text.
        seen: rows in normal form, those of the training and the held-out ones, by their numbers.
        options: further arguments of the chat template.
    """

    inputs: Inputs | None
    seen: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] | None = None
    _numbers: Sequence[int] = ()
    """Of the rows of the rollout under way."""
    _batch: dict[str, Any] | None
    """What a loss is computed of, while it is."""

    def first_batch(self) -> dict[str, Any] | None:
        """The first prompt with an image, by which the fast layers are checked."""
        if self.inputs is None:
            return None
        column = self.inputs.column
        row = next((row for row in self.seen if row[column]), None)
        return None if row is None else first_batch(self.inputs, self._ids(row), row[column])

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        assert self.inputs is not None
        return self.inputs.ids(row["prompt"], row[self.inputs.column], prompting=True, options=self.options)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.inputs is None:
            return super()._generate_and_score_completions(inputs)
        self._numbers = [int(row[NUMBER]) for row in inputs]
        column = self.inputs.column
        rows = [dict(self.seen[number]) for number in self._numbers]
        given = [row.pop(column) for row in rows]  # by this name TRL would take it for pictures
        for row, own in zip(rows, given, strict=True):
            row["prompt"] = self.inputs.named(row["prompt"], own)
        batch = super()._generate_and_score_completions(rows)
        return {**batch, NUMBER: torch.tensor(self._numbers, device=batch["prompt_ids"].device)}

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.inputs is None:
            return super()._tokenize_prompts(prompts)
        made = {number: self._ids(self.seen[number]) for number in dict.fromkeys(self._numbers)}
        return [list(made[number]) for number in self._numbers], None, {}

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; rewards are handed images, each opened once."""
        if self.inputs is None:
            return super()._calculate_rewards(inputs, *args, **kwargs)
        column = self.inputs.column
        opened = {number: self.inputs.opened(self.seen[number][column]) for number in dict.fromkeys(self._numbers)}
        rows = [{**row, column: opened[number]} for row, number in zip(inputs, self._numbers, strict=True)]
        return super()._calculate_rewards(rows, *args, **kwargs)

    def beside_prompts(self, numbers: Sequence[int]) -> Callable[..., Any] | None:
        """What an engine asks for the prompts of these rows, None for text; see :func:`ft_rl.inputs.beside_of`."""
        if self.inputs is None:
            return None
        return beside_of(self.inputs, [self.seen[number][self.inputs.column] for number in numbers])

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As TRL's, which calls the model with text: here with what stands beside it, some rows at a time."""
        if self.inputs is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs
            )
        numbers = list(self._numbers) if self._batch is None else self._batch[NUMBER].tolist()
        size = batch_size or len(input_ids)
        found = []
        for start in range(0, len(input_ids), size):
            part = slice(start, start + size)
            ids, mask = input_ids[part], attention_mask[part]
            ask = self.beside_prompts(numbers[part])
            assert ask is not None
            beside = ask(range(len(ids)), ids.cpu(), mask.cpu())
            seeing = model if beside is None else functools.partial(model, **{BESIDE: beside})
            found.append(
                super()._get_per_token_logps_and_entropies(seeing, ids, mask, logits_to_keep, None, *args, **kwargs)
            )
        logprobs, entropies, losses = zip(*found, strict=True)
        return (
            torch.cat(logprobs),
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )
