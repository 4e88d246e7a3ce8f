"""Where the documents of a batch lie, worked out once and used by every layer.

Everything that the backends need is made from it on first use and kept: cumulative lengths on the device, the keys that
each query sees, flex attention's block mask, the order that puts documents of one length side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from ft_kernels.ops.packed_attention.choose import ROUND

__all__ = ["AttentionPlan", "BlockLists", "block_lists"]

T = TypeVar("T")
BlockLists = tuple[Tensor, Tensor, Tensor, Tensor]


class AttentionPlan:
    """The documents of a row of tokens. Made by :func:`ft_kernels.plan_attention`; valid for one batch.

    Attributes:
        lengths: the documents' lengths on the host, or None where they are known on the device only.
        max_length: the longest document; where the host doesn't know it, the bound that the caller gave.
        total: the number of tokens, or None where it is known on the device only.
        count: the number of documents, or None where it is known on the device only.
        together: bool ``[total]``, true at tokens that see what follows them in their run, within a document; or None.
        branches: for documents that share how they begin, the lengths of what each group shares and of what follows.
    """

    branches: tuple[tuple[int, ...], ...] | None = None

    @property
    def copied_total(self) -> int:
        """The number of tokens with what documents share copied for each."""
        return sum(self.host_lengths())

    def __init__(
        self,
        *,
        lengths: Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        begins: Tensor | None = None,
        max_length: int | None = None,
        together: Tensor | None = None,
    ) -> None:
        # Empty documents change nothing.
        self.lengths = None if lengths is None else tuple(length for length in lengths if length)
        self.total = sum(self.lengths) if self.lengths is not None else None if begins is None else begins.numel()
        self.max_length = max(self.lengths, default=0) if self.lengths is not None else max_length or 0
        self.count = len(self.lengths) if self.lengths is not None else None
        if cu_seqlens is not None:
            self.count = cu_seqlens.numel() - 1
        self._given_cu_seqlens = cu_seqlens
        self._begins = begins
        self.together = together
        self._kept: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"AttentionPlan(count={self.count}, total={self.total}, max_length={self.max_length})"

    @property
    def equal(self) -> bool:
        """Whether all documents are known to have one length, so that they are a batch without padding."""
        return self.lengths is not None and len(set(self.lengths)) == 1

    @property
    def recurs(self) -> bool:
        """Whether all documents are known to have lengths that were chosen, not those of texts (``ROUND``)."""
        return self.lengths is not None and all(length % ROUND == 0 for length in self.lengths)

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` gave the first time that this key was asked for."""
        if key not in self._kept:
            if torch.is_inference_mode_enabled():
                # An evaluation may come first, and autograd takes nothing that was made under inference_mode.
                with torch.inference_mode(False):
                    self._kept[key] = make()
            else:
                self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    def host_lengths(self) -> tuple[int, ...]:
        """The lengths on the host; waits for the device, once, where they were not given there."""
        if self.lengths is None:
            self.lengths = tuple(self.cu_seqlens(None).diff().tolist())
        return self.lengths

    def cu_seqlens(self, device: torch.device | None) -> Tensor:
        """``[count + 1]`` int32: where each document begins, and the end. Device None: wherever it is."""

        def make() -> Tensor:
            if self._given_cu_seqlens is not None:
                found = self._given_cu_seqlens
            elif self.lengths is not None:
                found = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
            else:
                assert self._begins is not None
                starts = self._begins.nonzero().flatten()
                found = torch.cat([starts, starts.new_tensor([self._begins.numel()])])
            found = found.to(device=device, dtype=torch.int32, non_blocking=True)
            return found.clone() if found.is_inference() else found

        return self.keep(("cu_seqlens", device), make)

    def intervals(self, causal: bool, window: int | None, total: int, device: torch.device) -> Tensor:
        """``[4, total]`` int32: the first and last key that a query sees, the first and last query that sees a key.

        Each of the four never decreases along the row, so a tile's bounds are those of its first and last token. Made
        on the device without waiting for it.
        """

        def make() -> Tensor:
            start, end = self._bounds(total, device)
            here = torch.arange(total, device=device)
            if not causal:
                return torch.stack([start, end - 1, start, end - 1]).int()
            lo, last = start, end - 1
            if window is not None:
                lo = torch.maximum(lo, here - (window - 1))
                last = torch.minimum(last, here + (window - 1))
            if self.together is None:
                return torch.stack([lo, here, here, last]).int()
            first, final = self._runs(start, self.together.to(device))
            return torch.stack([lo, final, first, last]).int()

        return self.keep(("intervals", causal, window, total, device), make)

    @staticmethod
    def _runs(start: Tensor, together: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the last token of each token's run; of one that is in none, itself."""
        here = torch.arange(len(start), device=start.device)
        opens = torch.ones_like(together)
        opens[1:] = ~together[1:] | ~together[:-1] | (start[1:] != start[:-1])
        first = torch.where(opens, here, 0).cummax(0).values
        # A run ends where the next token opens one.
        closes = torch.ones_like(opens)
        closes[:-1] = opens[1:]
        final = torch.where(closes, here, len(here)).flip(0).cummin(0).values.flip(0)
        return first, final

    def pairs(self, window: int | None, device: torch.device) -> Tensor:
        """bool ``[total, total]``, true where a token sees another: for those who compute with masks of that size."""
        total = sum(self.host_lengths())
        here = torch.arange(total, device=device)
        first, last = self.intervals(True, window, total, device)[:2, :, None]
        seen: Tensor = (here >= first) & (here <= last)
        return seen

    def _bounds(self, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each token's document: its first token and the one after its last."""
        here = torch.arange(total, device=device)
        if self._begins is not None:
            begins = self._begins.to(device)
            start = torch.where(begins, here, 0).cummax(0).values
            # The next beginning after a token: looking back from the end, where the row's end counts as one.
            following = torch.where(begins, here, total)[1:]
            end = torch.cat([following, following.new_full((min(total, 1),), total)]).flip(0).cummin(0).values.flip(0)
            return start, end
        cu_seqlens = self.cu_seqlens(device).long()
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), here, right=True)
        # Tokens behind the last document, if a caller's cu_seqlens ends early, must not read out of bounds.
        document = document.clamp(max=cu_seqlens.numel() - 2)
        return cu_seqlens[document], cu_seqlens[document + 1]

    def by_length(self, device: torch.device) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
        """The order that puts documents of one length side by side, its inverse, ``(documents, length)`` of each."""

        def make() -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
            groups: dict[int, list[Tensor]] = {}
            start = 0
            for length in self.host_lengths():
                if length:
                    groups.setdefault(length, []).append(torch.arange(start, start + length))
                start += length
            order = torch.cat([piece for pieces in groups.values() for piece in pieces] or [torch.arange(0)])
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(order.numel())
            shapes = tuple((len(pieces), length) for length, pieces in groups.items())
            return order.to(device), inverse.to(device), shapes

        return self.keep(("by length", device), make)


def block_lists(intervals: Tensor, block: int) -> BlockLists:
    """Which blocks of keys each block of queries sees in part and sees whole, as flex attention's BlockMask lists them.

    Worked out from the intervals of each block's first and last query, never from the whole mask, on the device.

    Returns:
        The number of blocks seen in part and their numbers, ``[1, 1, blocks]`` and ``[1, 1, blocks, blocks]``; the same
        of blocks seen whole.
    """
    lo, hi = intervals[0].long(), intervals[1].long()
    total = lo.numel()
    first = torch.arange(0, total, block, device=lo.device)
    last = (first + block - 1).clamp(max=total - 1)
    begin, end = first[None], first[None] + block - 1
    seen = (end >= lo[first][:, None]) & (begin <= hi[last][:, None])
    whole = (begin >= lo[last][:, None]) & (end <= hi[first][:, None]) & (first + block <= total)[:, None]
    lists = []
    for mask in (seen & ~whole, whole):
        lists.append(mask.sum(-1, dtype=torch.int32)[None, None])
        lists.append(mask.int().argsort(dim=-1, descending=True, stable=True).int()[None, None])
    return lists[0], lists[1], lists[2], lists[3]
