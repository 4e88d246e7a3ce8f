"""A decoder layer computed by ft_kernels, from the parts that a layout names.

What is fused is the mathematics of the layer's own modules: their parameters are read, and each gets its gradient where
it wants one. A part that only its own code can compute (an adapter with a variant, a layer with hooks) is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ft_kernels as kernels
from ft_core.fast.again import Choice
from ft_core.fast.blocks import Blocks, Keep
from ft_core.fast.documents import Batch
from ft_core.fast.layout import Layout, at
from ft_core.fast.linears import base_of, frozen, read, updates

__all__ = ["DecoderLayer", "norm"]


def norm(module: nn.Module, layout: Layout, x: Tensor) -> Tensor:
    """A norm of the family, computed by the kernels."""
    weight: Any = module.weight
    return kernels.rms_norm(x, weight, at(module, layout.norm_form.eps), offset=layout.norm_form.offset)


@dataclass(eq=False)
class DecoderLayer:
    """One layer's computation.

    Attributes:
        module: transformers' layer, whose modules and parameters stay where they are.
        layout: where they are.
        blocks: its halves as one operation each, where they can be.
        choice: what waits for backward.
    """

    module: nn.Module
    layout: Layout
    blocks: Blocks = field(init=False)
    choice: Choice = "keep"

    def __post_init__(self) -> None:
        self.blocks = Blocks(self.module, self.layout)

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; None for all before it."""
        names = self.layout.attention
        return None if names.window is None else at(at(self.module, names.module), names.window)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        *,
        keep: Keep | None = None,
        answer: bool = True,
        tile: int | None = None,
    ) -> Tensor:
        """The layer's output ``[B, S, H]``.

        Args:
            x: ``[B, S, H]``.
            cos, sin: of the tokens' angles, ``[B or 1, S, rotary dimensions]``.
            batch: the documents.
            keep: what the blocks keep, instead of what they say.
            answer: whether the output's numbers are wanted, or its graph alone.
            tile: how many rows the blocks compute at a time; None for all.
        """
        norms, scale = self.layout.norms, self.layout.residual_scale
        attend = self._attend(batch)
        after = self.blocks.attention(x, cos, sin, attend, keep, tile)
        if after is None:
            branch = self._attention(self._norm(norms.attention, x), cos, sin, attend)
            after = self._joined(x, branch, norms.after_attention, scale)
        done = self.blocks.mlp(after, keep, answer, tile)
        if done is None:
            done = self._joined(after, self._mlp(self._norm(norms.mlp, after)), norms.after_mlp, scale)
        return done

    def _attend(self, batch: Batch) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention over the batch's documents, of q, k and v ``[B, S, heads, D]``."""
        names = self.layout.attention
        module = at(self.module, names.module)
        projections = [base_of(at(module, name)) for name in names.qkv[:2]]  # v's needs nothing
        trained = torch.is_grad_enabled() and any(p.requires_grad for each in projections for p in each.parameters())
        exact: dict[str, Any] = {"exact": True} if trained else {}  # blocks, where nothing is, know no such keyword
        return functools.partial(
            kernels.packed_attention,
            plan=batch.plan,
            window=self.window,
            softcap=None if names.softcap is None else at(module, names.softcap),
            scale=at(module, names.scaling),
            **exact,
        )

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return norm(at(self.module, name), self.layout, x)

    def _joined(self, x: Tensor, branch: Tensor, after: str | None, scale: float) -> Tensor:
        if after is not None:
            branch = self._norm(after, branch)
        return x + branch if scale == 1.0 else torch.add(x, branch, alpha=scale)

    def _attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        layout, names = self.layout, self.layout.attention
        module = at(self.module, names.module)
        d = layout.head_dim
        sizes = [layout.heads * d, layout.kv_heads * d, layout.kv_heads * d]
        q, k, v = (part.unflatten(-1, (-1, d)) for part in _products([at(module, n) for n in names.qkv], x, sizes))
        if names.q_norm is not None:
            q = norm(at(module, names.q_norm), layout, q)
        if names.k_norm is not None:
            k = norm(at(module, names.k_norm), layout, k)
        q, k = kernels.rope(q, k, cos, sin, layout=names.rotary)
        out = attend(q, k, v)
        return _products([at(module, names.out)], out.flatten(-2), [x.shape[-1]])[0]

    def _mlp(self, x: Tensor) -> Tensor:
        names = self.layout.mlp
        module = at(self.module, names.module)
        ins, out = [at(module, name) for name in names.gate_up], at(module, names.down)
        parts = _products(ins, x, None)
        gate, up = parts if len(parts) == 2 else (parts[0], None)  # one layer makes both
        if names.activation == "silu":
            h = kernels.swiglu(gate, up)
        else:
            h = kernels.geglu(gate, up, approximate="tanh" if names.activation == "gelu_tanh" else "none")
        return _products([out], h, None)[0]


def _products(modules: Sequence[nn.Module], x: Tensor, sizes: list[int] | None) -> list[Tensor]:
    """The outputs of linear layers of one input; of one that makes several parts, split by sizes."""
    known = frozen([read(module) for module in modules])
    if known is None:
        outputs = [module(x) for module in modules]
    else:
        weights = [linear.weight for linear in known]
        a, b, named = updates(known)
        given = weights if len(weights) > 1 else weights[0]
        outputs = list(kernels.lora_qkv(x, given, a, b, sizes=[linear.sizes[0] for linear in known], **named))
    if sizes is not None and len(outputs) == 1 and len(sizes) > 1:
        outputs = list(outputs[0].split(sizes, -1))
    return outputs
