"""The halves of a layer as one operation each, where nothing but adapters is trained: ft_kernels' blocks.

They keep less for backward than the single operations do, and go over memory less often. What they cannot compute (a
trained base weight, norms after a branch, an adapter that is no plain low-rank update) is left to those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ft_kernels as kernels
from ft_core.fast.layout import Layout, at
from ft_core.fast.linears import frozen, read, updates
from ft_core.fast.wide import Wide

__all__ = ["Blocks", "Keep"]

Keep = Literal["all", "most", "inputs", "none"]


@dataclass(eq=False)
class Blocks:
    """The halves of one layer.

    Attributes:
        module, layout: the layer, and where its parts are.
        keep: what stays in memory for backward (see :func:`ft_kernels.attention_block`).
        wide: its weights with room for updates.
    """

    module: nn.Module
    layout: Layout
    keep: Keep = "most"
    wide: Wide = field(default_factory=Wide)

    def attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor | None:
        """``x`` with the attention's branch added, or None where it cannot be one operation."""
        parts, heads = self._first(), self._head_norms()
        if parts is None or any(n is not None and n.weight.requires_grad for n in heads) or not parts.fits(x):
            return None
        layout, names = self.layout, self.layout.attention
        return kernels.attention_block(
            x, *parts.positional,
            heads=layout.heads, kv_heads=layout.kv_heads, head_dim=layout.head_dim, cos=cos, sin=sin,
            attention=attention, q_norm=heads[0], k_norm=heads[1], layout=names.rotary, keep=self.keep, **parts.named,
        )  # fmt: skip

    def mlp(self, x: Tensor) -> Tensor | None:
        """``x`` with the perceptron's branch added, or None where it cannot be one operation."""
        parts = self._second()
        if parts is None or not parts.fits(x):
            return None
        activation = self.layout.mlp.activation
        return kernels.mlp_block(x, *parts.positional, activation=activation, keep=self.keep, **parts.named)

    @property
    def able(self) -> bool:
        """Whether both halves can be one operation each, as the layer is now."""
        trained = any(n is not None and n.weight.requires_grad for n in self._head_norms())
        return not trained and self._first() is not None and self._second() is not None

    def _first(self) -> _Half | None:
        names, norms = self.layout.attention, self.layout.norms
        return self._half(names.module, names.qkv, names.out, norms.attention, norms.after_attention, 3)

    def _second(self) -> _Half | None:
        names, norms = self.layout.mlp, self.layout.norms
        return self._half(names.module, names.gate_up, names.down, norms.mlp, norms.after_mlp, 2)

    def _head_norms(self) -> list[Any]:
        names = self.layout.attention
        own = self.module.get_submodule(names.module)
        return [None if n is None else self._norm(own.get_submodule(n)) for n in (names.q_norm, names.k_norm)]

    def _norm(self, module: Any) -> Any:
        form = self.layout.norm_form
        return kernels.Norm(module.weight, at(module, form.eps), form.offset)

    def _half(self, where: str, ins: Sequence[str], out: str, norm: str, after: str | None, count: int) -> _Half | None:
        if after is not None or self.layout.residual_scale != 1.0 or len(ins) != count:
            return None
        own = self.module.get_submodule(where)
        known = frozen([read(own.get_submodule(name)) for name in (*ins, out)])
        first = self._norm(self.module.get_submodule(norm))
        if known is None or first.weight.requires_grad:
            return None
        if len({linear.adapter.a.dtype for linear in known if linear.adapter is not None}) > 1:
            return None
        weights = self.wide.of(where + ".in", known[:-1]), self.wide.of(where + ".out", known[-1:])
        a, b, named = updates(known)
        dtype = known[0].weight.dtype if isinstance(known[0].weight, Tensor) else None
        return _Half((first, *weights, a, b), named, dtype)


@dataclass(frozen=True)
class _Half:
    positional: tuple[Any, ...]
    named: dict[str, Any]
    dtype: torch.dtype | None

    def fits(self, x: Tensor) -> bool:
        """Whether the input is in the weights' dtype, as the blocks want it; quantized weights have none."""
        return self.dtype in (None, x.dtype)
