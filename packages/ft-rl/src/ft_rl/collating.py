"""From tokenized preferences to the padded batches that TRL's trainers take; the padding is taken out by the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_rl.inputs import GIVEN

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.training.inputs import Inputs

__all__ = ["BESIDE", "LabelledCollator", "PairCollator", "padded"]

BESIDE = "beside"
"""The key of a batch, and the keyword of :class:`ft_rl.policy.PolicyForward`, for what it holds beside text."""
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps")
"""Columns of log-probabilities that a trainer has worked out beforehand."""


def padded(sequences: Sequence[Sequence[int]], prompts: Sequence[int], pad: int) -> dict[str, Tensor]:
    """Sequences of tokens as a batch, padded on the right.

    Args:
        sequences: tokens of prompt and answer. prompts: how many of each are the prompt's. pad: fills the ends.

    Returns:
        ``input_ids``, ``attention_mask`` and ``completion_mask``, int64 ``[B, L]``, L the longest length; the last is 1
        at the tokens of answers.
    """
    import torch

    def batch(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    masks = [[0] * n + [1] * (len(ids) - n) for ids, n in zip(sequences, prompts, strict=True)]
    return {
        "input_ids": batch(sequences, pad),
        "attention_mask": batch([[1] * len(ids) for ids in sequences], 0),
        "completion_mask": batch(masks, 0),
    }


@dataclass(frozen=True)
class PairCollator:
    """Batches of pairs: all chosen sequences, then all rejected ones, as TRL's DPO trainer has them.

    A feature is a dict of ``chosen_ids``, ``rejected_ids`` and ``prompt_length``.

    Attributes:
        inputs: sees to what a feature holds beside text, in :data:`ft_rl.inputs.GIVEN`; the batch then has a
            :class:`ft_core.fast.beside.Beside`, unless there is none of it.
    """

    pad_token_id: int
    inputs: Inputs | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        sequences = [f[side] for side in ("chosen_ids", "rejected_ids") for f in features]
        prompts = [f["prompt_length"] for f in features]
        batch: dict[str, Any] = padded(sequences, prompts * 2, self.pad_token_id)
        batch |= _worked_out(features)
        if self.inputs is not None:
            given = [f[GIVEN] for f in features] * 2
            beside = self.inputs.beside(given, batch["input_ids"], batch["attention_mask"])
            batch |= {} if beside is None else {BESIDE: beside}
        return batch

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of a batch of sequences of these lengths, which the policy computes without their padding."""
        return sum(lengths)


@dataclass(frozen=True)
class LabelledCollator:
    """Batches of answers with labels, as TRL's KTO trainer has them.

    A feature is a dict of ``completion_ids`` (prompt and answer), ``prompt_length`` and ``label``. The KL term is
    estimated from prompts with other rows' answers: each prompt gets that of the row before it in the batch.

    Attributes:
        kl: whether to add those, as ``KL_input_ids`` and so on. max_length: where they are cut, as TRL cuts them.
    """

    pad_token_id: int
    kl: bool = True
    max_length: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        prompts = [f["prompt_length"] for f in features]
        batch = padded([f["completion_ids"] for f in features], prompts, self.pad_token_id)
        if self.kl:
            answers = [f["completion_ids"][f["prompt_length"] :] for f in features]
            mismatched = [
                [*f["completion_ids"][:n], *answer][: self.max_length]
                for f, n, answer in zip(features, prompts, [answers[-1], *answers[:-1]], strict=True)
            ]
            batch |= {f"KL_{name}": value for name, value in padded(mismatched, prompts, self.pad_token_id).items()}
        batch["label"] = torch.tensor([bool(f["label"]) for f in features])
        return batch | _worked_out(features)

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """See :meth:`PairCollator.batch_tokens`."""
        return sum(lengths)


def _worked_out(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    import torch

    return {name: torch.tensor([f[name] for f in features]) for name in REFERENCE if name in features[0]}
