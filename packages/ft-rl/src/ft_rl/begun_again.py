"""Steps on completions of the model's own that are computed once more where they did not fit, and the longest one.

A step begun again trains on the completions that it has: they are not drawn, scored or rewarded a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ft_core.training.moment import Moment
from ft_core.training.replan import ReplanningMixin

if TYPE_CHECKING:
    _Base = ReplanningMixin
else:
    _Base = object

__all__ = ["BegunAgainMixin", "longest_prompts", "made_up"]

log = logging.getLogger(__name__)


class BegunAgainMixin(_Base):
    """Keeps what each micro-batch of an optimizer step was made of, until the next step.

    Put it before ``RunTrainerMixin``. What runs out of memory while completions are written or scored is not begun
    again: a tighter plan of the training's layers leaves that as it is.

    Attributes:
        prompt_tokens: of each row of the training data; empty where nobody has counted.
    """

    prompt_tokens: Sequence[int] = ()
    _step: int
    _prepared: dict[int, tuple[Any, Moment]]
    _prepared_for: int = -1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, from a step that has not begun."""
        self._prepared, self._prepared_for = {}, -1
        return super().train(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's; for a micro-batch that was there before, the same again, and all as it was when it was there."""
        if isinstance(generation_batch, Mapping):  # made up, to try the longest
            return generation_batch
        if not self.model.training or not self.is_in_train:
            return super()._prepare_inputs(generation_batch)
        if self._prepared_for != self.state.global_step:
            self._prepared, self._prepared_for = {}, self.state.global_step
        known = self._prepared.get(self._step)
        if known is not None:
            batch, then = known
            then.restore(self)
            return batch
        batch = super()._prepare_inputs(generation_batch)
        self._prepared[self._step] = batch, self._now()
        return batch

    def _tighter(self, inputs: Any) -> str | None:
        """As for any step, by the tokens of its completions; None where those are what did not fit."""
        if isinstance(inputs, Mapping):
            return super()._tighter(dict(inputs))
        known = self._prepared.get(self._step)
        return None if known is None else super()._tighter(known[0])

    def longest(self) -> dict[str, Any] | None:
        """The longest prompts that come together, each with a completion of the full length."""
        try:
            lengths = longest_prompts(self, self.prompt_tokens)
            return None if not lengths else self.made_up(lengths)
        except Exception:
            log.debug("the longest batch is not tried: it cannot be made up", exc_info=True)
            return None

    def made_up(self, lengths: Sequence[int]) -> dict[str, Any]:
        """A micro-batch as it is trained on, of prompts of these lengths; see :func:`made_up`."""
        raise NotImplementedError


def longest_prompts(trainer: Any, lengths: Sequence[int]) -> list[int]:
    """The lengths of the prompts of the longest micro-batch of the first epoch; none where they are not known.

    A rollout's completions are shuffled before they are cut into micro-batches, so any of a rollout may come together.

    Args:
        lengths: tokens of each row's prompt.
    """
    loader = trainer.get_train_dataloader()
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None or len(lengths) != len(trainer.train_dataset):
        return []
    count, steps = len(sampler), trainer.args.max_steps
    if steps > 0:  # the training ends before the others
        count = min(count, steps * trainer.args.gradient_accumulation_steps)
    best: list[int] = []
    before: list[int] = []
    for indices in islice(sampler, count):
        if indices == before:  # the sampler names a rollout's rows once for each update that it serves
            continue
        before = indices
        found = sorted((lengths[index] for index in indices), reverse=True)
        found = found[: trainer.args.per_device_train_batch_size]
        if sum(found) > sum(best):
            best = found
    return best


def made_up(words: Sequence[int], lengths: Sequence[int], new: int, device: torch.device) -> dict[str, Any]:
    """A micro-batch such as TRL's trainer makes of completions, with one of ``new`` tokens to each prompt.

    Args:
        words: tokens that prompts and completions are filled with, over and over.
        lengths: tokens of each prompt.

    Returns:
        ``prompt_ids`` and ``prompt_mask`` ``[B, P]``, padded on the left; ``completion_ids`` and ``completion_mask``
        ``[B, T]``; ``advantages`` ``[B]``, ``num_items_in_batch``, and log-probabilities ``[B, T]`` of the policy that
        wrote, of the engine and of the reference.
    """
    width = max(lengths)

    def text(count: int) -> Tensor:
        return torch.tensor((list(words) * (count // len(words) + 1))[:count], device=device)

    prompts = torch.stack([torch.nn.functional.pad(text(n), (width - n, 0)) for n in lengths])
    for row, n in enumerate(lengths):
        prompts[row, width - n] = row  # each begins otherwise: what rows share is computed once, and takes less
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths], device=device)
    completions = text(new).repeat(len(lengths), 1)
    logprobs = torch.full(completions.shape, -1.0, device=device)
    return {
        "prompt_ids": prompts,
        "prompt_mask": mask,
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.ones(len(lengths), device=device),
        "num_items_in_batch": torch.tensor(completions.numel(), device=device),
        "old_per_token_logps": logprobs,
        "sampling_per_token_logps": logprobs,
        "ref_per_token_logps": logprobs,
    }
