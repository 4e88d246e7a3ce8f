"""How likely a model finds answers: sums of log-probabilities, for evaluation and for references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_rl.collating import padded

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.fast.beside import Beside
    from ft_rl.policy import Scores

__all__ = ["Likelihoods", "batches_of", "likelihoods"]

TOKENS_AT_ONCE = 4096
"""About how many tokens are computed at a time, padding included."""


@dataclass(frozen=True)
class Likelihoods:
    """Of sequences of prompt and answer; each ``[N]``, float64, on the CPU.

    Attributes:
        sums: of the log-probabilities of an answer's tokens.
        counts: how many these are.
    """

    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """The mean log-probability of an answer's tokens; 0 for an answer without one."""
        return self.sums / self.counts.clamp(min=1)


def likelihoods(
    model: Any,
    sequences: Sequence[Sequence[int]],
    prompts: Sequence[int],
    pad: int,
    progress: Any = None,
    beside: Callable[[Sequence[int], Tensor, Tensor], Beside | None] | None = None,
) -> Likelihoods:
    """Score answers by a model as it is, without gradients.

    Args:
        model: with its head, and perhaps an adapter.
        sequences: tokens of prompt and answer. prompts: how many of each are the prompt's.
        pad: a token id. progress: called with (done, all).
        beside: what some of the sequences hold beside text, by their numbers, ids and mask; for models that ft's layers
            can score.
    """
    import torch

    score = _scorer(model)
    sums = torch.zeros(len(sequences), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    done = 0
    for batch in batches_of([len(ids) for ids in sequences]):
        if progress is not None:
            progress(done, len(sequences))
        made = padded([sequences[i] for i in batch], [prompts[i] for i in batch], pad)
        ids, mask, answers = (
            made[name].to(model.device) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        more = () if beside is None else (beside(batch, made["input_ids"], made["attention_mask"]),)
        with torch.no_grad():
            scores = score(ids, mask, ids.masked_fill(answers == 0, -100), *more)
        sums[batch] = scores.logprobs.double().sum(1).cpu()
        counts[batch] = scores.labelled.sum(1).double().cpu()
        done += len(batch)
    return Likelihoods(sums, counts)


def batches_of(lengths: Sequence[int], tokens: int = TOKENS_AT_ONCE) -> Iterator[list[int]]:
    """Positions of sequences in batches of about so many tokens, the longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _scorer(model: Any) -> Any:
    """What scores labelled tokens: the chunked head, or for families that it doesn't know plain logits."""
    from ft_core.fast import fast_path_of
    from ft_core.fast.scores import Scorer
    from ft_rl.policy import PolicyForward

    scorer = Scorer.of(model)
    if scorer is None:
        return lambda ids, mask, labels: _by_logits(model, ids, mask, labels)
    return PolicyForward(scorer, padding_free=fast_path_of(model) is not None).score


def _by_logits(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Scores:
    from ft_kernels.functional import cross_entropy
    from ft_rl.policy import Scores

    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    labels = labels[:, 1:]
    labelled = (labels != -100) & mask[:, :-1].bool()
    losses = cross_entropy(logits.float(), labels.masked_fill(~labelled, -100), reduction="none")
    return Scores(-losses, None, None, None, labelled)
