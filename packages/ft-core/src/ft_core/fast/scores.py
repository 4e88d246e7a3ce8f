"""A model's last hidden states without padding, and its log-probabilities of given tokens without whole logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

import ft_kernels as kernels
from ft_core.data.collating import LENGTHS
from ft_core.fast.beside import Beside
from ft_core.fast.find import NotFast, layout_of, unwrapped
from ft_core.fast.head import can_fuse
from ft_core.fast.layout import Layout, at
from ft_core.fast.lent import head_lent
from ft_core.fast.linears import read
from ft_core.fast.sharing import LEAST, MOST, groups_of, saved
from ft_core.fast.swap import fast_path_of
from ft_kernels.functional import TokenLogProbs

__all__ = ["Backbone", "Scorer", "Unpadded"]

MEMORY = 2**30
"""Bytes of logits at a time where no fast layers say how many there may be."""
WASTE, MASK = 0.25, 4
"""Without the fast layers: padding, as a share of the tokens, that costs less than attention over one row of all
documents, and how many times as large that row's mask may be as those of the padded rows."""


@dataclass(frozen=True, eq=False)
class Unpadded:
    """The tokens of a padded batch ``[B, L]`` as one row of documents.

    Attributes:
        kept: bool ``[B, L]``, true where there is a token.
        ids, positions: int64 ``[1, T]``, document after document; positions count from 0 in each.
        lengths: tokens of each row that has any.
        branches: where rows share how they begin, their groups as :func:`ft_kernels.plan_attention` takes them: T is
            then less than the sum of the lengths.
        at: int64 ``[B, L]``, where each token lies in the row.
    """

    kept: Tensor
    ids: Tensor
    positions: Tensor
    lengths: list[int]
    branches: list[list[int]] | None
    at: Tensor

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, *, share: bool = False, beside: Beside | None = None
    ) -> Unpadded:
        """Take the padding out; each row's tokens are one run, wherever it begins. Waits for the device once.

        Args:
            share: whether to compute once what rows share at their beginnings, where that is worth it. Only the fast
                layers can, and it waits for the device twice.
            beside: what the batch holds beside text: rows begin alike as far as it is the same.
        """
        kept = attention_mask.bool()
        if share and 1 < len(kept) <= MOST and (shared := cls._sharing(input_ids, kept, beside)) is not None:
            return shared
        lengths = [n for n in kept.sum(1).tolist() if n]
        positions = (kept.cumsum(1) - 1)[kept]
        at = (kept.flatten().cumsum(0) - 1).view(kept.shape)
        return cls(kept, input_ids[kept][None], positions[None], lengths, None, at)

    @classmethod
    def _sharing(cls, input_ids: Tensor, kept: Tensor, beside: Beside | None) -> Unpadded | None:
        """With what rows share only once; None where that saves too little."""
        ids, mask = input_ids.cpu().numpy(), kept.cpu().numpy()
        rows = [i for i in range(len(ids)) if mask[i].any()]
        tokens = [ids[i][mask[i]] for i in rows]
        apart = ids if beside is None else beside.told_apart(ids)
        groups = groups_of([apart[i][mask[i]] for i in rows])
        if saved(groups, sum(map(len, tokens))) < LEAST:
            return None
        at = np.zeros(ids.shape, np.int64)
        parts, positions, branches, end = [], [], [], 0
        for group in groups:
            n, first = group.shared, tokens[group.rows[0]]
            begin, end = end, end + n
            parts.append(first[:n])
            positions.append(np.arange(n))
            branches.append([n])
            for i in group.rows:
                own = len(tokens[i]) - n
                at[rows[i]][mask[rows[i]]] = np.concatenate([np.arange(begin, begin + n), np.arange(end, end + own)])
                parts.append(tokens[i][n:])
                positions.append(np.arange(n, n + own))
                branches[-1].append(own)
                end += own
        made = (
            torch.from_numpy(x).to(input_ids.device) for x in (np.concatenate(parts), np.concatenate(positions), at)
        )
        row, places, where = made
        return cls(kept, row[None], places[None], list(map(len, tokens)), branches, where)

    def places(self, wanted: Tensor) -> Tensor:
        """Where the tokens of ``wanted``, bool ``[B, L]`` and all of them kept, lie in the row: int64 ``[N]``."""
        return self.at[wanted]


@dataclass(frozen=True, eq=False)
class Backbone:
    """What gives the last hidden states of a model with any head.

    Attributes:
        model: the model with its head, not an adapter's wrapping.
        layout: of its family.
    """

    model: Any
    layout: Layout

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """That of a model or of what wraps it; None where :meth:`need` raises."""
        try:
            return cls.need(model)
        except NotFast:
            return None

    @classmethod
    def need(cls, model: Any) -> Self:
        """That of a model or of what wraps it.

        Raises:
            NotFast: its family is not known, or this model computes more than its family does.
        """
        model = unwrapped(model)
        return cls(model, layout_of(model))

    def unpadded(self, input_ids: Tensor, attention_mask: Tensor, beside: Beside | None = None) -> Unpadded | None:
        """A padded batch ``[B, L]`` as one row, where it is computed faster as such: the model has to keep documents of
        one row apart. By the fast layers, what rows share at their beginnings is computed once, such as the prompt of a
        pair or of a group's completions; in training a dropout draws once for it.
        """
        path = fast_path_of(self.model)
        fast = path is not None and path.on
        # what runs both ways in what documents share is not known to attention
        share = fast and (beside is None or self.layout.together is None)
        row = Unpadded.of(input_ids, attention_mask, share=share, beside=beside)
        if not row.lengths:
            return None
        # transformers' attention computes what a mask between documents then discards, and makes the mask
        rows, width, total = *row.kept.shape, sum(row.lengths)
        wasteful = rows * width > (1 + WASTE) * total and total**2 <= MASK * rows * width**2
        packs = fast or wasteful
        return row if packs else None

    def hidden(self, row: Unpadded, beside: Beside | None = None) -> Tensor:
        """The last hidden states ``[T, H]`` of documents that do not see each other."""
        lengths = row.lengths if row.branches is None else row.branches
        more = {"position_ids": row.positions} if beside is None else beside.packed(row)
        return self.states(input_ids=row.ids, lengths=lengths, **more)[0]

    def hidden_at(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        wanted: Tensor,
        *,
        padding_free: bool = True,
        beside: Beside | None = None,
    ) -> Tensor:
        """The last hidden states ``[N, H]`` at places of a padded batch, row after row; computed without padding.

        Args:
            input_ids: int64 ``[B, L]``. attention_mask: ``[B, L]``, nonzero at each row's one run of tokens.
            wanted: bool ``[B, L]``, true at tokens only.
            padding_free: whether the model keeps documents of one row apart; where not, the batch stays padded.
            beside: what the batch holds beside text.
        """
        row = self.unpadded(input_ids, attention_mask, beside) if padding_free else None
        if row is not None:
            return self.hidden(row, beside)[row.places(wanted)]
        places = (attention_mask.bool().cumsum(1) - 1).clamp(min=0)  # of each token within its row's run
        more = {"position_ids": places} if beside is None else beside.padded(places)
        return self.states(input_ids=input_ids, attention_mask=attention_mask, **more)[wanted]

    def states(self, *, lengths: Sequence[int] | Sequence[Sequence[int]] | None = None, **inputs: Any) -> Tensor:
        """The last hidden states of a batch, by the fast layers where they are on.

        Args:
            lengths: of the documents in a batch of one row, or their groups (see :class:`Unpadded`).
            inputs: of the backbone: ``input_ids``, and ``attention_mask`` or ``position_ids``.
        """
        path = fast_path_of(self.model)
        if path is not None and path.on and lengths is not None:
            inputs[LENGTHS] = list(lengths)
        if path is not None:
            path.own_head = True
        try:
            states: Tensor = at(self.model, self.layout.outer)(**inputs, use_cache=False).last_hidden_state
        finally:
            if path is not None:
                path.own_head = False
        return states


@dataclass(frozen=True, eq=False)
class Scorer(Backbone):
    """Scores tokens by a model whose head the kernels can compute."""

    @classmethod
    def need(cls, model: Any) -> Self:
        """The scorer of a model or of what wraps it.

        Raises:
            NotFast: as :meth:`Backbone.need`; or the model has no head, or one that the kernels cannot compute.
        """
        found = super().need(model)
        head = getattr(found.model, found.layout.head, None)
        if not isinstance(head, nn.Module):
            raise NotFast(f"it has no head {found.layout.head!r}")
        if not can_fuse(head):
            whole = hasattr(head, "modules_to_save")
            kind = "trained in full (lora.modules_to_save)" if whole else f"a {type(head).__name__}, not a linear layer"
            raise NotFast(f"its head {found.layout.head!r} is {kind}")
        return found

    def logprobs(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool | Literal["detached"] = False,
        top1: bool = False,
    ) -> TokenLogProbs:
        """The log-probability of each target (see :func:`ft_kernels.linear_logprob`).

        Args:
            hidden: ``[N, H]``, the state before each target. targets: int64 ``[N]``.
        """
        linear = read(getattr(self.model, self.layout.head))
        assert linear is not None
        path, adapter = fast_path_of(self.model), linear.adapter
        with head_lent(path):
            made = kernels.linear_logprob(
                hidden,
                linear.weight,
                targets,
                bias=linear.bias,
                lora=None if adapter is None else (adapter.a, adapter.b, adapter.scaling),
                temperature=temperature,
                softcap=self.layout.logit_softcap,
                logit_scale=self.layout.logit_scale,
                entropy=entropy,
                top1=top1,
                max_memory=MEMORY if path is None else path.chooser.head,
            )
        return TokenLogProbs(made, None, None) if isinstance(made, Tensor) else made

    @torch.no_grad()
    def mean_logits(self, hidden: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The mean over the vocabulary of the logits of each hidden state ``[N, H]``; NaN where there is a softcap.

        The mean of a linear map's results is the map by the mean of its rows.
        """
        linear = read(getattr(self.model, self.layout.head))
        assert linear is not None
        if self.layout.logit_softcap is not None:
            return hidden.new_full(hidden.shape[:1], float("nan"), dtype=torch.float32)
        adapter, scale = linear.adapter, self.layout.logit_scale / temperature
        with head_lent(fast_path_of(self.model)), torch.autocast(hidden.device.type, enabled=False):
            mean = linear.weight.mean(0, dtype=torch.float32)
            if adapter is not None:
                mean = mean + adapter.scaling * adapter.b.mean(0, dtype=torch.float32) @ adapter.a.float()
            result: Tensor = hidden.float() @ mean
            if linear.bias is not None:
                result = result + linear.bias.mean(dtype=torch.float32)
        return result * scale
