"""The head through which TRL's trainers ask a model for log-probabilities, computed without padding or whole logits.

TRL's trainers call ``model(..., labels=labels, fused_lm_head=True)`` and read a ``FusedCausalLMOutput``; in their
constructors they give the model a forward that answers so. :func:`put_head` puts another in its place, on the instance:
padding is taken out before the backbone, and ft_kernels' chunked head scores the tokens that have a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ft_core.data.collating import IGNORE, keeps_documents_apart
from ft_core.errors import ConfigError
from ft_core.fast import NotFast, fast_path_of
from ft_core.fast.beside import Beside
from ft_core.fast.forwards import Replaced
from ft_core.fast.scores import Scorer
from ft_rl.reference import at_zero

if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput

__all__ = ["PolicyForward", "Scores", "check_layers", "put_head"]

REQUIRED = frozenset({"input_ids", "attention_mask", "labels"})
KNOWN = REQUIRED | {"use_cache", "num_items_in_batch"}
"""What a batch of text holds; whatever else there is (images, router logits) is for TRL's own forward."""
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Scores:
    """What a policy says of the labelled tokens of a padded batch ``[B, L]``; all of shape ``[B, L − 1]``.

    Each field stands at the position before its token, and is zero where there is no label.

    Attributes:
        logprobs: log-probabilities of the labels under ``softmax(logits / temperature)``.
        entropy: of the distributions, in nats; None where it was not asked for.
        top1: bool, whether the label is the likeliest token; None where it was not asked for.
        mean_logits: mean over the vocabulary, divided by the temperature; None where it was not asked for.
        labelled: bool, where there is a label.
    """

    logprobs: Tensor
    entropy: Tensor | None
    top1: Tensor | None
    mean_logits: Tensor | None
    labelled: Tensor


class PolicyForward(Replaced):
    """The forward of a model that is trained by one of TRL's trainers.

    Attributes:
        scorer: computes hidden states and log-probabilities.
        temperature: divides the logits.
        fields: which of ``log_probs``, ``entropy``, ``mean_logits`` and ``is_top1`` a trainer reads.
        entropy: ``"detached"`` where the entropy is only looked at, True where it is trained.
        padding_free: whether the model keeps documents of one row apart, so that padding can be left out.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        temperature: float = 1.0,
        fields: Sequence[str] = ("log_probs",),
        entropy: Literal[True, "detached"] = "detached",
        padding_free: bool = True,
    ) -> None:
        super().__init__(scorer.model)
        if unknown := set(fields) - set(FIELDS):
            raise ValueError(f"unknown fields {sorted(unknown)}; allowed are {', '.join(FIELDS)}")
        self.scorer, self.temperature, self.fields = scorer, temperature, tuple(fields)
        self.entropy, self.padding_free = entropy, padding_free

    def __call__(self, *args: Any, fused_lm_head: bool = False, beside: Beside | None = None, **inputs: Any) -> Any:
        if not fused_lm_head:
            return self.own(*args, **inputs)
        given = {name: value for name, value in inputs.items() if value is not None}  # PEFT hands on all that it knows
        if args or not REQUIRED <= set(given) <= KNOWN:
            return self.own(*args, fused_lm_head=True, **inputs)
        scores = self.score(given["input_ids"], given["attention_mask"], given["labels"], beside)
        return self._output(scores, given.get("num_items_in_batch"))

    def score(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, beside: Beside | None = None) -> Scores:
        """Score the labelled tokens of a padded batch.

        Args:
            input_ids: int64 ``[B, L]``. attention_mask: ``[B, L]``, nonzero at each row's one run of tokens.
            labels: int64 ``[B, L]``, -100 where a token is not scored. A row's first token never is: nothing is before
                it.
            beside: what the batch holds beside text.
        """
        path = fast_path_of(self.module)
        with at_zero(self.module) if path is not None and path.on else nullcontext():
            return self._scores(input_ids, attention_mask, labels, beside)

    def _scores(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, beside: Beside | None) -> Scores:
        next_labels = labels[:, 1:]
        labelled = (next_labels != IGNORE) & attention_mask[:, :-1].bool()
        hidden = self.hidden_before(input_ids, attention_mask, labelled, beside)
        made = self.scorer.logprobs(
            hidden,
            next_labels[labelled],
            temperature=self.temperature,
            entropy=self.entropy if "entropy" in self.fields else False,
            top1="is_top1" in self.fields,
        )
        top1 = None if made.top1 is None else made.top1 == next_labels[labelled]
        mean = None
        if "mean_logits" in self.fields:
            mean = self.scorer.mean_logits(hidden, temperature=self.temperature)
        entropy, top1, mean = (None if x is None else _spread(x, labelled) for x in (made.entropy, top1, mean))
        return Scores(_spread(made.logprobs, labelled), entropy, top1, mean, labelled)

    def hidden_before(
        self, input_ids: Tensor, attention_mask: Tensor, labelled: Tensor, beside: Beside | None = None
    ) -> Tensor:
        """The last hidden states ``[N, H]`` before labelled tokens, of a padded batch that is computed without padding.

        Args:
            input_ids, attention_mask, beside: as for :meth:`score`. labelled: bool ``[B, L − 1]``, at the positions
                before.
        """
        wanted = torch.nn.functional.pad(labelled, (0, 1))
        return self.scorer.hidden_at(input_ids, attention_mask, wanted, padding_free=self.padding_free, beside=beside)

    def _output(self, scores: Scores, count: Any) -> FusedCausalLMOutput:
        from trl.trainer.utils import FusedCausalLMOutput

        divisor = scores.labelled.sum().clamp(min=1) if count is None else count
        return FusedCausalLMOutput(
            loss=-scores.logprobs.sum() / divisor,
            log_probs=scores.logprobs,
            entropy=scores.entropy,
            is_top1=scores.top1,
            mean_logits=scores.mean_logits,
            label_mask=scores.labelled,
        )


def put_head(
    model: Any, *, temperature: float = 1.0, fields: Sequence[str] = ("log_probs",),
    entropy: Literal[True, "detached"] = "detached", packs: bool | None = None,
) -> PolicyForward | None:  # fmt: skip
    """Give a model, which PEFT may have wrapped, the forward that answers TRL's trainers; None where it stays TRL's.

    It stays for a model whose family or head ft_core's layers do not know, and where the head has its own adapter,
    which TRL's trainers refuse.

    Args:
        temperature, fields, entropy: see :class:`PolicyForward`.
        packs: whether the model keeps documents of one row apart; None: it is tried, with documents of text.
    """
    scorer = Scorer.of(model)
    if scorer is None:
        return None
    apart = keeps_documents_apart(scorer.model) if packs is None else packs
    forward = PolicyForward(scorer, temperature=temperature, fields=fields, entropy=entropy, padding_free=apart)
    scorer.model.forward = forward
    return forward


def check_layers(model: Any, method: str) -> None:
    """Refuse a model whose log-probabilities ft_core's layers cannot give, for a method that has no others.

    Raises:
        ConfigError: it is one; says why.
    """
    try:
        Scorer.need(model)
    except NotFast as error:
        raise ConfigError(f"method: {method} needs ft's layers, which cannot compute this model: {error}") from None


def _spread(values: Tensor, labelled: Tensor) -> Tensor:
    """Values of the labelled tokens where these are, zero elsewhere; connected to the model even where none is."""
    return values.new_zeros(labelled.shape).masked_scatter(labelled, values)
