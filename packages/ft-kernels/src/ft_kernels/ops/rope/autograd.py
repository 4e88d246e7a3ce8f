"""Rotary position embedding as registered torch operations, for ``torch.compile`` and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["rope_inplace_op", "rope_op"]

_SETTINGS = (
    "Tensor cos, Tensor sin, Tensor? positions, int[] sections, bool interleaved, bool interleaved_sections, bool back"
)


@torch.library.custom_op(
    "ft_kernels::rope", mutates_args=(), schema=f"(Tensor q, Tensor k, {_SETTINGS}) -> (Tensor, Tensor)"
)
def rope_op(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    sections: list[int],
    interleaved: bool,
    interleaved_sections: bool,
    back: bool,
) -> tuple[Tensor, Tensor]:
    """q and k ``[B, S, heads, D]`` turned, by the kernel."""
    from ft_kernels.ops.rope import kernels

    return kernels.rotate(q, k, cos, sin, positions, sections, interleaved, interleaved_sections, back)


@rope_op.register_fake
def _(q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op(
    "ft_kernels::rope_",
    mutates_args={"q", "k"},
    schema=f"(Tensor(a!) q, Tensor(b!) k, {_SETTINGS}) -> ()",
)
def rope_inplace_op(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    sections: list[int],
    interleaved: bool,
    interleaved_sections: bool,
    back: bool,
) -> None:
    """q and k ``[B, S, heads, D]`` turned where they are, by the kernel; not for tensors that record gradients."""
    from ft_kernels.ops.rope import kernels

    kernels.rotate(q, k, cos, sin, positions, sections, interleaved, interleaved_sections, back, inplace=True)


@rope_inplace_op.register_fake
def _(q: Tensor, k: Tensor, *settings: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, *settings, back = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.settings = settings
    ctx.back = back


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    # The transpose of the rotation, also where cos² + sin² is not 1 (a scaled table).
    dq, dk = rope_op(dq, dk, *ctx.saved_tensors, *ctx.settings, not ctx.back)
    return dq, dk, *7 * (None,)


rope_op.register_autograd(_backward, setup_context=_setup_context)
