"""Which tokens of a batch see each other: worked out once a batch, before the first layer.

transformers builds a mask of all pairs of tokens for a packed or padded batch; here a batch is a list of documents, and
attention runs over those. Padding is a document of its own, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ft_kernels import AttentionPlan, plan_attention

__all__ = ["BATCH", "Batch", "batch_of"]

BATCH = "ft_batch"
"""The keyword by which the backbone hands the batch's documents to its layers."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What all layers share.

    Attributes:
        plan: the documents of the batch as one row of tokens; None where each row of the batch is one.
    """

    plan: AttentionPlan | None

    @property
    def images(self) -> bool:
        """Whether there are runs of tokens that see what follows them in it."""
        return self.plan is not None and self.plan.together is not None

    def counted(self, tokens: int) -> int:
        """As a batch of how many tokens this one, of so many, counts in what computing a layer takes.

        Copies of what documents share take up to a third of what a token of its own does, and come and go in attention
        alone, so that they count only where they are more than three times the tokens.
        """
        shared = self.plan is not None and self.plan.branches is not None
        return max(tokens, -(-self.plan.copied_total // 3)) if shared and self.plan is not None else tokens

    def seeing(self, shape: tuple[int, int], together: Tensor) -> Batch | None:
        """This batch ``[B, S]``, in which tokens of a run see what follows them in it; None if that is not to be had.

        Args:
            together: bool ``[B, S]``, true at tokens of such runs. Waits for the GPU once.
        """
        if not bool(together.any()):
            return self
        if self.plan is not None and self.plan.branches is not None:
            return None  # documents that share how they begin are copied; what runs in them is not known
        lengths = [shape[1]] * shape[0] if self.plan is None else self.plan.host_lengths()
        return Batch(plan_attention(lengths=lengths, together=together))

    def pairs(self, x: Tensor, window: int | None) -> Tensor:
        """The mask of pairs of tokens ``[B, 1, S, S]``, true where one sees the other, for a layer of x ``[B, S, H]``.

        It is as large as such masks are: for a layer that runs on its own code.
        """
        if self.plan is not None and self.plan.branches is not None:
            return self.plan.pairs(window, x.device)[None, None]
        rows, length = x.shape[:2]
        if self.plan is not None and self.images:
            number = torch.arange(rows * length, device=x.device).view(rows, 1, 1, length)
            first, last = self.plan.intervals(True, window, rows * length, x.device)[:2].view(2, rows, 1, length, 1)
            within: Tensor = (number >= first) & (number <= last)
            return within
        here = torch.arange(length, device=x.device)
        distance = here[:, None] - here
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if self.plan is None:
            return seen.expand(rows, 1, length, length)
        lo = self.plan.intervals(True, None, rows * length, x.device)[0].view(rows, 1, length, 1)
        row = torch.arange(rows, device=x.device).view(rows, 1, 1, 1) * length
        return seen & (here >= lo - row)


def batch_of(
    shape: tuple[int, int],
    attention_mask: Any,
    position_ids: Tensor | None,
    lengths: Sequence[int] | Sequence[Sequence[int]] | None,
    keywords: dict[str, Any],
) -> Batch | None:
    """The documents of a batch ``[B, S]``; None if they are no documents (a mask of pairs, or with holes).

    Args:
        attention_mask: ``[B, S]``, nonzero where a token is no padding, or None; anything else is not understood.
        position_ids: as the caller gave them; None means that each row counts from 0. Those of time, height and width,
            ``[3, B, S]``, say nothing of documents, so that each row is one; before them there may be those of the
            text, ``[4, B, S]``, which are then as ``[B, S]`` are.
        lengths: of the documents in the batch's one row, or None; a list for each group of documents that share how
            they begin (:func:`ft_kernels.plan_attention`). They spare a look at the positions, which waits for the GPU.
        keywords: further keywords of the forward pass; transformers' ``cu_seq_lens_q`` and ``max_length_q`` do as well.
    """
    if lengths is not None:
        flat = [n for n in lengths if isinstance(n, int)]
        groups = [n for n in lengths if not isinstance(n, int)]
        return Batch(plan_attention(branches=groups) if groups else plan_attention(lengths=flat))
    starts, longest = keywords.get("cu_seq_lens_q"), keywords.get("max_length_q")
    if starts is not None and longest is not None:
        return Batch(plan_attention(cu_seqlens=starts, max_length=int(longest)))
    padded: Sequence[int] | None = None
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != tuple(shape):
            return None
        padded = _runs(attention_mask)
        if padded is None:
            return None
        if len(padded) == shape[0]:
            padded = None  # no padding at all
    if position_ids is not None and position_ids.dim() == 3:
        # Time, height and width; text positions, which say where documents begin, come before them where there are any.
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
    if position_ids is None:
        return Batch(None if padded is None else plan_attention(lengths=padded))
    if position_ids.dim() != 2 or position_ids.shape[-1] != shape[1]:
        return None
    if padded is not None:
        # Positions of padded rows count from anywhere; they restart nowhere within a row's tokens.
        return Batch(plan_attention(lengths=padded)) if _counts(position_ids, attention_mask) else None
    if position_ids.shape[0] != shape[0]:
        position_ids = position_ids.expand(shape)
    return Batch(plan_attention(position_ids=position_ids))


def _runs(attention_mask: Tensor) -> list[int] | None:
    """The lengths of the runs of tokens and of padding, row after row; None if a row's tokens are not one run.

    The mask is looked at on the host, all at once: one wait for the GPU, however many rows there are.
    """
    mask = attention_mask.ne(0).cpu()
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    if bool(((mask & ~before).sum(1) > 1).any()):
        return None
    edges = mask != before
    edges[:, :1] = True  # each row begins a run
    starts = edges.flatten().nonzero().flatten().tolist()
    return [b - a for a, b in pairwise([*starts, mask.numel()])]


def _counts(position_ids: Tensor, attention_mask: Any) -> bool:
    """Whether positions go up by one from each token of a row to the next."""
    if position_ids.shape[0] != attention_mask.shape[0]:
        position_ids = position_ids.expand(attention_mask.shape)
    inside = attention_mask.ne(0)
    steps = position_ids[:, 1:] - position_ids[:, :-1]
    return bool(((steps == 1) | ~(inside[:, 1:] & inside[:, :-1])).all())
