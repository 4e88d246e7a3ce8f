"""Attention over kept keys and values as registered torch operations. There are no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_attention_op", "rope_append_op"]


@torch.library.custom_op(
    "ft_kernels::decode_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor keys, Tensor values, Tensor lengths, int window, float scale) -> Tensor",
)
def decode_attention_op(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    """``[B, H, D]``, by the kernel; window 0 is none."""
    from ft_kernels.ops.decode_attention import kernels

    return kernels.attention(q, keys, values, lengths, window, scale)


@decode_attention_op.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "ft_kernels::rope_append",
    mutates_args={"keys", "values"},
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor positions, Tensor cos, "
    "Tensor sin) -> Tensor",
)
def rope_append_op(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The turned queries ``[B, H, D]``, by the kernel."""
    from ft_kernels.ops.decode_attention import kernels

    return kernels.append(q, k, v, keys, values, positions, cos, sin)


@rope_append_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    return q.new_empty(q.shape)
