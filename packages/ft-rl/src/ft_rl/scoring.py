"""A reward model's pass without padding: the score of a sequence is its head at the sequence's last token.

transformers' sequence classifiers compute a padded batch, a score at each of its places, and pick one a row.
:func:`put_scores` gives such a model, on the instance, a forward that takes the padding out before the backbone and has
the head compute what is picked alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ft_core.data.collating import keeps_documents_apart
from ft_core.fast.forwards import Replaced
from ft_core.fast.scores import Backbone
from ft_rl.likelihoods import batches_of

__all__ = ["ScoreForward", "last_tokens", "put_scores", "score_sequences", "scorer_of"]

ASKED = frozenset({"input_ids", "attention_mask", "use_cache"})
"""What TRL's reward trainer gives the model."""
KNOWN = ASKED | {"return_dict"}
"""What PEFT adds to it; whatever else there is (labels, say) is for the model's own forward."""


class ScoreForward(Replaced):
    """The forward of a transformers sequence classifier that computes batches without their padding.

    Attributes:
        backbone: computes hidden states.
        padding_free: whether the model keeps documents of one row apart, so that padding can be left out.
    """

    def __init__(self, backbone: Backbone, *, padding_free: bool = True) -> None:
        super().__init__(backbone.model)
        self.backbone, self.padding_free = backbone, padding_free

    @classmethod
    def of(cls, model: Any) -> ScoreForward | None:
        """That of a model, which PEFT may have wrapped: the one that it has, or one that is not put there.

        None where the model is no sequence classifier of the usual kind, or of a family that ft_core's layers do not
        know. It tries whether the model keeps documents apart.
        """
        from transformers.modeling_layers import GenericForSequenceClassification

        backbone = Backbone.of(model)
        if backbone is None or type(backbone.model).forward is not GenericForSequenceClassification.forward:
            return None
        known = vars(backbone.model).get("forward")
        if isinstance(known, cls):
            return known
        return cls(backbone, padding_free=keeps_documents_apart(backbone.model))

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        given = {name: value for name, value in inputs.items() if value is not None}
        pad = self.backbone.model.config.get_text_config().pad_token_id
        known = ASKED <= set(given) <= KNOWN and not given["use_cache"] and given.get("return_dict", True)
        if args or not known or pad is None or not self.padding_free:
            return self.own(*args, **inputs)
        row = self.backbone.unpadded(given["input_ids"], given["attention_mask"])
        if row is None or len(row.lengths) < len(row.kept):
            return self.own(**inputs)
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        hidden = self.backbone.hidden(row)[row.places(last_tokens(given["input_ids"], row.kept, pad))]
        return SequenceClassifierOutputWithPast(logits=self.backbone.model.score(hidden))


def last_tokens(input_ids: Tensor, kept: Tensor, pad: int) -> Tensor:
    """Where the score of each row of a padded batch stands: bool ``[B, L]``, true once a row.

    As in transformers it is the last token that is not called as padding is: where a tokenizer pads with the token that
    ends a text, the last but that one. Of a row of nothing else it is the first.

    Args:
        input_ids: int64 ``[B, L]``. kept: bool ``[B, L]``, true where there is a token, of which each row has one.
        pad: the id of padding.
    """
    numbers = torch.arange(1, kept.shape[1] + 1, device=kept.device)
    last = (numbers * (kept & (input_ids != pad))).argmax(1)
    last = torch.where(kept.gather(1, last[:, None])[:, 0], last, kept.long().argmax(1))
    return torch.zeros_like(kept).scatter_(1, last[:, None], True)


def put_scores(model: Any) -> ScoreForward | None:
    """Give a sequence classifier the forward without padding; None where it keeps its own (:meth:`ScoreForward.of`)."""
    forward = ScoreForward.of(model)
    if forward is not None:
        forward.module.forward = forward
    return forward


def scorer_of(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A sequence classifier's scores ``[B]`` of a batch's ids and mask, int64 ``[B, L]``, without padding where it can.

    The model stays as it is. Its configuration's ``pad_token_id`` has to be that of the batches.
    """
    forward = ScoreForward.of(model) or model

    def score(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        device = model.device
        made = forward(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
        scores: Tensor = made.logits[:, 0]
        return scores

    return score


@torch.no_grad()
def score_sequences(
    score: Callable[[Tensor, Tensor], Tensor],
    sequences: Sequence[Sequence[int]],
    *,
    pad: int,
    tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The score of each sequence: float32 ``[N]``, on the CPU.

    Args:
        score: of a batch padded on the right, by its ids and mask, int64 ``[B, L]`` each on the CPU: ``[B]``.
        sequences: token ids, none empty. pad: the id of padding. tokens: how many are in a batch, padding counted.
        progress: called with (done, all).
    """
    scores = torch.zeros(len(sequences))
    done = 0
    for batch in batches_of([len(ids) for ids in sequences], tokens):
        if progress is not None:
            progress(done, len(sequences))
        rows = [torch.tensor(sequences[i], dtype=torch.int64) for i in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        scores[batch] = score(ids, mask).float().cpu()
        done += len(batch)
    return scores
