"""Documents that share how they begin: a prompt and several answers, computed once as long as they are the same.

A row holds a prefix and then its branches, each of which continues the prefix. All but attention treats a token by
itself and needs no more than this row. For attention the prefix's keys, values and queries are copied, once for each
branch, which makes documents of the ordinary kind; of the outputs each token takes one, and the gradients of copies are
added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.packed_attention.direct import Direct
from ft_kernels.ops.packed_attention.plan import AttentionPlan
from ft_kernels.ops.shared_rows.autograd import SumRows, sum_rows

__all__ = ["SharedDirect", "SharedPlan"]

PIECE = 8192
"""Copies that are there at a time, about: enough to keep a GPU busy."""


class SharedPlan(AttentionPlan):
    """The documents of a row in which some share a prefix. Made by :func:`ft_kernels.plan_attention`.

    Attributes:
        branches: of each group of documents the prefix's length and those of its branches, in the row's order.
        whole: the documents with their prefixes copied, and what knows of shared prefixes nothing.
        total: the number of the row's tokens.
    """

    branches: tuple[tuple[int, ...], ...]

    def __init__(self, branches: Sequence[Sequence[int]]) -> None:
        super().__init__(lengths=[length for group in branches for length in group])
        self.branches = tuple(tuple(group) for group in branches)
        self.whole = AttentionPlan(lengths=[prefix + own for prefix, *rest in self.branches for own in rest])
        self.max_length = self.whole.max_length

    @property
    def copied_total(self) -> int:
        """E, the number of tokens of ``whole``."""
        return self.whole.copied_total

    def intervals(self, causal: bool, window: int | None, total: int, device: torch.device) -> Tensor:
        raise TypeError("what a token sees is no interval where documents share a prefix; use the plan's whole")

    def pieces(self) -> list[SharedPlan]:
        """The row in parts of whole groups, each with about ``PIECE`` copies or with one group."""

        def make() -> list[SharedPlan]:
            parts: list[list[tuple[int, ...]]] = [[]]
            room = PIECE
            for group in self.branches:
                copies = group[0] * (len(group) - 1) + sum(group[1:])
                if parts[-1] and copies > room:
                    parts.append([])
                    room = PIECE
                parts[-1].append(group)
                room -= copies
            return [self] if len(parts) == 1 else [SharedPlan(part) for part in parts]

        return self.keep("pieces", make)

    def pairs(self, window: int | None, device: torch.device) -> Tensor:
        of_copies = self.whole.pairs(window, device)[self.answers(device)[:, 0].long()]
        total = len(of_copies)
        seen = torch.zeros(total, total, dtype=torch.int32, device=device)
        return seen.index_add(1, self.copies(device)[:, 0], of_copies.int()) > 0

    def copies(self, device: torch.device) -> Tensor:
        """int32 ``[E, 1]``: the token that each token of ``whole`` is a copy of."""
        return self._tables(device)[0]

    def answers(self, device: torch.device) -> Tensor:
        """int32 ``[T, 1]``: the first copy of each token."""
        return self._tables(device)[1]

    def every(self, device: torch.device) -> Tensor:
        """int32 ``[T, C]``: all copies of each token; -1 where it has fewer than C."""
        return self._tables(device)[2]

    def answered(self, device: torch.device) -> Tensor:
        """int32 ``[E, 1]``: the token that a token of ``whole`` is the first copy of; -1 for further copies."""
        return self._tables(device)[3]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            copies, every = [], []
            start = place = 0  # in the row, in the whole
            most = max((len(group) - 1 for group in self.branches), default=1)
            for prefix, *rest in self.branches:
                shared = torch.arange(start, start + prefix)
                start += prefix
                found = torch.full((prefix, most), -1)
                for i, own in enumerate(rest):
                    copies += [shared, torch.arange(start, start + own)]
                    found[:, i] = torch.arange(place, place + prefix)
                    start, place = start + own, place + prefix + own
                every.append(found)
                begin = place - sum(rest) - prefix * len(rest)
                for own in rest:
                    begin += prefix
                    single = torch.full((own, most), -1)
                    single[:, 0] = torch.arange(begin, begin + own)
                    every.append(single)
                    begin += own
            of, all_of = (torch.cat(parts or [torch.empty(0, dtype=torch.int64)]) for parts in (copies, every))
            all_of = all_of.view(-1, most)
            first = all_of[:, :1].contiguous()
            answered = torch.full((len(of), 1), -1)
            answered[first[:, 0], 0] = torch.arange(len(first))
            tables = (of[:, None], first, all_of, answered)
            made = [table.int().contiguous().to(device, non_blocking=True) for table in tables]
            return made[0], made[1], made[2], made[3]

        return self.keep(("shared", device), make)

    def copied(self, x: Tensor) -> Tensor:
        """Tokens ``[T, ...]`` as those of ``whole``, ``[E, ...]``, with a graph."""
        out: Tensor = SumRows.apply(x, self.copies(x.device), self.every(x.device))  # type: ignore[no-untyped-call]
        return out

    def taken(self, x: Tensor) -> Tensor:
        """The first copies ``[T, ...]`` of what was computed for ``whole``, ``[E, ...]``, with a graph."""
        out: Tensor = SumRows.apply(x, self.answers(x.device), self.answered(x.device))  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True, eq=False)
class SharedDirect:
    """:class:`Direct` for documents that share prefixes: copies are there for some groups of documents at a time.

    Attributes:
        pieces: of the row, in order: the groups, and the kernels for their copies.
    """

    pieces: tuple[tuple[SharedPlan, Direct], ...]

    def _parts(self, *given: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors ``[..., heads, D]``, each a piece's part ``[T, heads, D]`` of it."""
        lengths = [sum(map(sum, plan.branches)) for plan, _ in self.pieces]
        return zip(*(x.flatten(0, -3).split(lengths) for x in given), strict=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Direct.forward`."""
        out = dispatch.allocate(q.shape, q.dtype, q.device)
        every: list[Tensor] = []
        for (plan, kernels), (own_q, own_k, own_v, own) in zip(self.pieces, self._parts(q, k, v, out), strict=True):
            copies = plan.copies(q.device)
            made, kept = kernels.forward(*(sum_rows(x, copies) for x in (own_q, own_k, own_v)))
            sum_rows(made, plan.answers(q.device), own)
            every += kept
        return out, every

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Direct.backward`."""
        dq, dk, dv = (dispatch.allocate(x.shape, x.dtype, x.device) for x in (q, k, v))
        parts = zip(self.pieces, self._parts(grad, q, k, v, out), self._parts(dq, dk, dv), kept, strict=True)
        for (plan, kernels), (up, *given), results, one in parts:
            copies, every = plan.copies(q.device), plan.every(q.device)
            # the output of a further copy counts nowhere, but the kernels want it with the lse that belongs to it
            own_q, own_k, own_v, own_out = (sum_rows(x, copies) for x in given)
            grads = kernels.backward(sum_rows(up, plan.answered(q.device)), own_q, own_k, own_v, own_out, [one])
            del own_q, own_k, own_v, own_out
            for made, result in zip(grads, results, strict=True):
                sum_rows(made, every, result)
        return dq, dk, dv
