"""Packed rows, each of another length, as rows of lengths that come again: what recorded steps need.

A recorded step is one shape. Documents may lie in it as they like, since the kernel that computes their attention reads
their bounds on the GPU; but the tokens must be as many each time, so that a document of padding fills the row up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ft_core.data.collating import IGNORE
from ft_kernels import AttentionPlan, plan_attention

__all__ = ["LONGEST", "WIDEST", "documents_plan", "filled_up", "recurring_length", "recurs"]

LONGEST = 3071
"""The longest document in a recorded step: up to here one kernel, whose launch knows no lengths, is the fastest."""
STEPS = 16
"""Lengths between a power of two and the next: at most one token in sixteen is padding, in a row of some length."""
LEAST = 64
WIDEST = 256
"""The most numbers of a head that the kernel takes."""


def recurring_length(total: int) -> int:
    """The length of the row that so many tokens are filled up to."""
    step = max(LEAST, (1 << max(total - 1, 1).bit_length()) // (2 * STEPS))
    return -(-total // step) * step


def filled_up(ids: Tensor, labels: Tensor, positions: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
    """A row of documents with one more of padding (or several, of ``LONGEST``), whose labels are ignored.

    Args:
        ids, labels, positions: int64 ``[1, T]``. lengths: of the documents, in order; they add up to T.

    Returns:
        ``ids``, ``labels`` and ``positions``, int64 ``[1, L]``, and ``documents``, int32 ``[1, L]``: the number of each
        token in its document, from 0. All on the device of ``ids``, which is not waited for.
    """
    total = ids.shape[1]
    more = recurring_length(total) - total
    padding = [min(LONGEST, more - done) for done in range(0, more, LONGEST)]
    documents = torch.cat([torch.arange(n, dtype=torch.int32) for n in (*lengths, *padding)])[None]
    if ids.is_cuda:
        documents = documents.pin_memory().to(ids.device, non_blocking=True)
    rest = documents[:, total:].to(positions.dtype)
    return {
        "ids": F.pad(ids, (0, more)),
        "labels": F.pad(labels, (0, more), value=IGNORE),
        "positions": torch.cat([positions, rest], 1),
        "documents": documents,
    }


def recurs(ids: Tensor, positions: Tensor | None, lengths: Sequence[int], head: Any, head_dim: int) -> bool:
    """Whether documents of these lengths are a row that :func:`filled_up` takes and a recorded step can compute.

    Args:
        head: the model's, whose weight is in the dtype that is computed in where autocast has none.
        head_dim: numbers of one of attention's heads.
    """
    autocast = torch.is_autocast_enabled("cuda")
    dtype: torch.dtype = torch.get_autocast_dtype("cuda") if autocast else head.weight.dtype
    return (
        positions is not None
        and ids.shape[0] == 1
        and positions.shape == ids.shape
        and sum(lengths) == ids.shape[1]
        and max(lengths, default=0) <= LONGEST
        # Other attention than the kernel's asks the host for the lengths.
        and dtype.itemsize == 2
        and head_dim <= WIDEST
        and torch.cuda.get_device_capability(ids.device) >= (8, 0)
    )


def documents_plan(documents: Tensor) -> AttentionPlan:
    """The documents of such a row; on a GPU its numbers are the GPU's alone, and a recording follows them."""
    return plan_attention(position_ids=documents, max_length=LONGEST)
