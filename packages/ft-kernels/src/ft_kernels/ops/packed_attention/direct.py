"""Packed attention as a forward and a backward that a caller calls by itself: the kernels without a graph around them.

An operation of its own costs the host more than half a millisecond a layer, there and back; inside an operation that is
differentiated by hand anyway, nobody needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ft_kernels.ops.packed_attention.autograd import by_torch, by_torch_backward
from ft_kernels.ops.packed_attention.choose import has_cudnn
from ft_kernels.ops.packed_attention.plan import AttentionPlan

if TYPE_CHECKING:
    from ft_kernels.ops.packed_attention.backends import Settings

__all__ = ["Direct", "direct"]


@dataclass(frozen=True, eq=False)
class Direct:
    """Attention of q ``[..., heads, D]``, k and v: the last dimension contiguous, the others as one row of tokens."""

    backend: str
    plan: AttentionPlan
    settings: Settings

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output ``[..., heads, D]`` in q's dtype, contiguous, and what else backward wants: its lse."""
        q3, k3, v3 = (x.flatten(0, -3) for x in (q, k, v))
        settings = self.settings
        if self.backend == "triton":
            from ft_kernels.ops.packed_attention import kernels

            out, lse = kernels.forward(q3, k3, v3, self._intervals(q3), None, settings.scale, settings.softcap or 0.0)
        else:
            out, lse = by_torch(q3, k3, v3, self._documents(q3), None, *self._settings())
        return out.view(q.shape), [lse]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, each contiguous."""
        (lse,) = kept
        grad3, q3, k3, v3, out3 = (x.flatten(0, -3) for x in (grad, q, k, v, out))
        settings = self.settings
        if self.backend == "triton":
            from ft_kernels.ops.packed_attention import kernels

            softcap = settings.softcap or 0.0
            grads = kernels.backward(
                grad3, q3, k3, v3, self._intervals(q3), None, out3, lse, settings.scale, softcap,
                settings.exact,
            )  # fmt: skip
        else:
            documents = self._documents(q3)
            grads = by_torch_backward(grad3, q3, k3, v3, documents, None, out3, lse, *self._settings())
        return grads[0].view(q.shape), grads[1].view(k.shape), grads[2].view(v.shape)

    def _intervals(self, q: Tensor) -> Tensor:
        return self.plan.intervals(self.settings.causal, self.settings.window, q.shape[0], q.device)

    def _documents(self, q: Tensor) -> Tensor | None:
        return None if self.backend == "dense" else self.plan.cu_seqlens(q.device)

    def _settings(self) -> tuple[str, int, bool, int, float]:
        given = self.settings
        return self.backend, self.plan.max_length, given.causal, given.window or 0, given.scale


def direct(backend: str, plan: AttentionPlan, settings: Settings, q: Tensor) -> Direct | None:
    """The kernels of a backend, or None for one that only autograd can differentiate."""
    able = backend in ("triton", "flash") or (backend == "dense" and has_cudnn(q))
    return Direct(backend, plan, settings) if able else None
