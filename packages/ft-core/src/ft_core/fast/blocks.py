"""The halves of a layer as one operation each, where nothing but adapters is trained: ft_kernels' blocks.

They keep less for backward than the single operations do, and go over memory less often. What they cannot compute (a
trained base weight, norms after a branch, an adapter that is no plain low-rank update) is left to those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ft_kernels as kernels
from ft_core.fast.layout import Layout, at
from ft_core.fast.linears import frozen, read, state, updates
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
    _known: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def attention(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        keep: Keep | None = None,
        tile: int | None = None,
    ) -> Tensor | None:
        """``x`` with the attention's branch added, or None where it cannot be one operation."""
        half = self._first()
        if half is None or not half.fits(x):
            return None
        out: Tensor = half.block(x, cos=cos, sin=sin, attention=attention, keep=keep or self.keep, tile=tile)
        return out

    def mlp(self, x: Tensor, keep: Keep | None = None, answer: bool = True, tile: int | None = None) -> Tensor | None:
        """``x`` with the perceptron's branch added, or None where it cannot be one operation."""
        half = self._second()
        if half is None or not half.fits(x):
            return None
        out: Tensor = half.block(x, keep=keep or self.keep, answer=answer, tile=tile)
        return out

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """What is made inside is made for other parameters in the places of these, and forgotten."""
        known, self._known = self._known, {}
        try:
            yield
        finally:
            self._known = known

    def forget(self) -> None:
        """Forget what was made of weights that lie elsewhere now."""
        self._known.clear()

    def undo(self) -> None:
        """Forget what was made, and give the weights memory of their own again."""
        self._known.clear()
        self.wide.undo(list(self.module.parameters()))

    @property
    def able(self) -> bool:
        """Whether both halves can be one operation each, as the layer is now."""
        return None not in self.halves()

    def takes(self, x: Tensor) -> bool:
        """Whether both halves of this x are one operation each."""
        return all(half is not None and half.fits(x) for half in self.halves())

    def halves(self) -> tuple[_Half | None, _Half | None]:
        """Both halves as operations, the same objects as long as nothing has changed; None for one that is none."""
        return self._first(), self._second()

    def _first(self) -> _Half | None:
        layout, names, norms = self.layout, self.layout.attention, self.layout.norms
        own = at(self.module, names.module)
        heads = [None if name is None else at(own, name) for name in (names.q_norm, names.k_norm)]

        def make(*given: Any, **named: Any) -> Any:
            q_norm, k_norm = (None if module is None else self._norm(module) for module in heads)
            return kernels.AttentionBlock(
                *given, heads=layout.heads, kv_heads=layout.kv_heads, head_dim=layout.head_dim,
                q_norm=q_norm, k_norm=k_norm, layout=names.rotary, **named,
            )  # fmt: skip

        return self._half(
            names.module, (*names.qkv, names.out), [norms.attention], norms.after_attention, 3, heads, make
        )  # fmt: skip

    def _second(self) -> _Half | None:
        names, norms = self.layout.mlp, self.layout.norms

        def make(*given: Any, **named: Any) -> Any:
            return kernels.MLPBlock(*given, activation=names.activation, **named)

        return self._half(names.module, (*names.gate_up, names.down), [norms.mlp], norms.after_mlp, 2, [], make)

    def _norm(self, module: Any) -> Any:
        form = self.layout.norm_form
        return kernels.Norm(module.weight, at(module, form.eps), form.offset)

    def _half(
        self, where: str, linears: Sequence[str], norm: list[str], after: str | None, count: int, heads: list[Any],
        make: Callable[..., Any],
    ) -> _Half | None:  # fmt: skip
        """What was made last, if nothing that it was made from has changed since."""
        if after is not None or self.layout.residual_scale != 1.0 or len(linears) != count + 1:
            return None
        own = at(self.module, where)
        modules = [at(own, name) for name in linears]
        norms = [at(self.module, norm[0]), *(module for module in heads if module is not None)]
        now = [state(module) for module in modules]
        now += [(id(n.weight), n.weight.requires_grad, at(n, self.layout.norm_form.eps)) for n in norms]
        half: _Half | None
        known, half = self._known.get(where, (None, None))
        if known != now:
            half = self._made(where, modules, norms, make)
            self._known[where] = ([state(module) for module in modules] + now[len(modules) :], half)
        return half

    def _made(self, where: str, modules: list[Any], norms: list[Any], make: Callable[..., Any]) -> _Half | None:
        known = frozen([read(module) for module in modules])
        if known is None or any(module.weight.requires_grad for module in norms):
            return None
        if len({linear.adapter.a.dtype for linear in known if linear.adapter is not None}) > 1:
            return None
        weights = self.wide.of(where + ".in", known[:-1]), self.wide.of(where + ".out", known[-1:])
        a, b, named = updates(known)
        dtype = known[0].weight.dtype if isinstance(known[0].weight, Tensor) else None
        return _Half(make(self._norm(norms[0]), *weights, a, b, **named), dtype, (modules, norms, known))


@dataclass(frozen=True)
class _Half:
    """One half, as an operation.

    Attributes:
        dtype: of its weights, None for quantized ones.
        made_from: kept, so that the identities in a state stay theirs.
    """

    block: Any
    dtype: torch.dtype | None
    made_from: Any

    def fits(self, x: Tensor) -> bool:
        """Whether the input is in the weights' dtype, as the blocks want it."""
        return self.dtype is None or self.dtype == x.dtype
