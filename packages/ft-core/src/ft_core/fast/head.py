"""The language-model head and its loss in one: logits are never whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ft_kernels as kernels
from ft_core.data.collating import IGNORE
from ft_core.fast.layout import Layout
from ft_core.fast.linears import read

__all__ = ["as_count", "can_fuse", "loss_of"]


def can_fuse(head: torch.nn.Module) -> bool:
    """Whether the kernels can compute the head: a plain linear layer, with at most one adapter without dropout."""
    linear = read(head)
    if linear is None or not isinstance(linear.weight, Tensor):
        return False
    return linear.adapter is None or linear.adapter.dropout == 0.0


def as_count(count: Any, device: torch.device) -> Tensor:
    """A number of tokens, which trainers give as a number or a tensor, as float32 on the device, without waiting."""
    if isinstance(count, Tensor):
        return count.to(device, torch.float32, non_blocking=True)
    return torch.full((), float(count), dtype=torch.float32, device=device)


def loss_of(
    head: torch.nn.Module, layout: Layout, hidden: Tensor, labels: Tensor, count: Any = None, *, shifted: bool = False,
    max_memory: int = 2**30,
) -> Tensor:  # fmt: skip
    """The mean of ``-log p(label)`` over the trained tokens, or the sum of it over ``count``; scalar, float32.

    Args:
        head: the linear layer, perhaps with an adapter.
        layout: of the family, for the softcap and scale of its logits.
        hidden: ``[B, S, H]``, what the last norm gave.
        labels: int64 ``[B, S]``, -100 where nothing is trained; each is predicted from the token before it.
        count: what the sum is divided by, a number or a tensor; None for the number of trained tokens.
        shifted: the labels are already those of the next token.
        max_memory: bytes that may be used at a time (see :func:`ft_kernels.linear_cross_entropy`).
    """
    linear = read(head)
    assert linear is not None
    if not shifted:
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)
    labels = labels.to(hidden.device)
    adapter = linear.adapter
    loss: Tensor = kernels.linear_cross_entropy(
        hidden, linear.weight, labels,
        bias=linear.bias,
        lora=None if adapter is None else (adapter.a, adapter.b, adapter.scaling),
        ignore_index=IGNORE,
        softcap=layout.logit_softcap,
        logit_scale=layout.logit_scale,
        reduction="mean" if count is None else "sum",
        max_memory=max_memory,
    )  # fmt: skip
    return loss if count is None else loss / as_count(count, loss.device)
