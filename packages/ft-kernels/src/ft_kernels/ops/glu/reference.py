"""Gated linear units in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KINDS", "backward", "glu", "halves"]

KINDS = ("silu", "gelu", "gelu_tanh")
"""The activations that gate; the operations know them by their number here."""


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up; where up is None, views of the two halves of the last dimension of a packed gate."""
    if up is not None:
        return gate, up
    width = gate.shape[-1] // 2
    return gate.narrow(-1, 0, width), gate.narrow(-1, width, width)


def glu(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    """``activation(gate) * up``, rounded once, differentiable by torch, twice too; ``kind`` counts in ``KINDS``."""
    gate, up = halves(gate, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    x = gate.to(wide)
    active = F.silu(x) if kind == 0 else F.gelu(x, approximate="tanh" if kind == 2 else "none")
    return (active * up.to(wide)).to(gate.dtype)


def backward(dh: Tensor, gate: Tensor, up: Tensor | None, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up for the gradient dh of the output h, and h itself, as a fused layer wants them."""
    gate, up = (t.detach().requires_grad_() for t in halves(gate, up))
    with torch.enable_grad():
        h = glu(gate, up, kind)
    dgate, dup = torch.autograd.grad(h, (gate, up), dh)
    return dgate, dup, h.detach()
