"""The layers of a decoder over kept keys and values: once for the prompts, all tokens in a row, then token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ft_kernels as kernels
from ft_core.fast.decoding.products import Product
from ft_core.fast.layout import Layout, at
from ft_core.fast.linears import state

__all__ = ["Layers", "looks"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer, by its number, of q ``[T, H, D]`` and k and v ``[T, G, D]``, not yet turned: ``[T, H, D]``."""


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    eps: float
    offset: float

    @classmethod
    def of(cls, module: Any, layout: Layout) -> _Norm:
        return cls(module.weight.detach(), float(at(module, layout.norm_form.eps)), layout.norm_form.offset)

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps, offset=self.offset)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)


class _Layer:
    def __init__(self, module: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
        names, mlp = layout.attention, layout.mlp
        attention, perceptron = at(module, names.module), at(module, mlp.module)
        self.layout, self.activation = layout, mlp.activation
        self.first, self.second = (
            _Norm.of(at(module, name), layout) for name in (layout.norms.attention, layout.norms.mlp)
        )
        self.q_norm, self.k_norm = (
            None if name is None else _Norm.of(at(attention, name), layout) for name in (names.q_norm, names.k_norm)
        )
        self.qkv = Product([at(attention, name) for name in names.qkv], dtype)
        self.out = Product([at(attention, names.out)], dtype)
        self.gate_up = Product([at(perceptron, name) for name in mlp.gate_up], dtype)
        self.down = Product([at(perceptron, mlp.down)], dtype)
        self.scale = float(at(attention, names.scaling))
        self.window: int | None = None if names.window is None else at(attention, names.window)

    @property
    def products(self) -> list[Product]:
        return [self.qkv, self.out, self.gate_up, self.down]

    def heads(self, x: Tensor, few: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[T, heads, D]`` of normed rows."""
        layout = self.layout
        groups = layout.heads, layout.kv_heads, layout.kv_heads
        parts = self.qkv(x, few).split([count * layout.head_dim for count in groups], 1)
        q, k, v = (part.unflatten(1, (-1, layout.head_dim)) for part in parts)
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v

    def perceptron(self, x: Tensor, few: bool) -> Tensor:
        packed = self.gate_up(x, few)
        if self.activation == "silu":
            h = kernels.swiglu(packed)
        else:
            h = kernels.geglu(packed, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(h, few)


class Layers:
    """All layers of a model, its embedding, last norm and head.

    Args:
        model: the transformers model itself, without an adapter's wrapping around it.
        layout: where its parts are.

    Raises:
        NotFast: a part can only be computed by its own code.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        backbone = at(model, layout.backbone)
        self.layout = layout
        self.embedding = model.get_input_embeddings().weight.detach()
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.layers = [_Layer(module, layout, self.dtype) for module in at(backbone, layout.layers)]
        self.norm = _Norm.of(at(backbone, layout.norm), layout)
        self.head = Product([getattr(model, layout.head)], self.dtype)
        self.rotary = at(backbone, layout.rotary)

    def refresh(self) -> None:
        """Take over what training may have changed in place: the adapters' numbers."""
        for product in (self.head, *(product for layer in self.layers for product in layer.products)):
            product.refresh()

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[positions, rotary dimensions]`` as the model's own module gives them."""
        numbers = torch.arange(positions, device=self.device)[None]
        cos, sin = self.rotary(torch.empty(0, dtype=self.dtype, device=self.device), numbers)
        return cos[0].contiguous(), sin[0].contiguous()

    def __call__(self, ids: Tensor, attend: Attend, *, few: bool) -> Tensor:
        """The last norm's output ``[T, H]``.

        Args:
            ids: ``[T]``.
            attend: turns q and k, keeps k and v, and attends.
            few: as a product has it.
        """
        residual = F.embedding(ids, self.embedding)
        x = self.layers[0].first(residual)
        norms = [*(layer.first for layer in self.layers[1:]), self.norm]
        for number, (layer, following) in enumerate(zip(self.layers, norms, strict=True)):
            out = attend(number, *layer.heads(x, few))
            x, residual = layer.second.of_sum(layer.out(out.flatten(1), few), residual)
            x, residual = following.of_sum(layer.perceptron(x, few), residual)
        return x


def looks(model: Any, layout: Layout) -> tuple[Any, ...]:
    """What :class:`Layers` reads, but for numbers in place, to be compared: another state needs other layers."""
    backbone = at(model, layout.backbone)
    layers = list(at(backbone, layout.layers))
    attention, mlp = layout.attention, layout.mlp
    linears = [f"{attention.module}.{name}" for name in (*attention.qkv, attention.out)]
    linears += [f"{mlp.module}.{name}" for name in (*mlp.gate_up, mlp.down)]
    norms = [layout.norms.attention, layout.norms.mlp]
    norms += [f"{attention.module}.{name}" for name in (attention.q_norm, attention.k_norm) if name is not None]
    modules = [at(layer, name) for layer in layers for name in linears] + [getattr(model, layout.head)]
    plain = [at(layer, name) for layer in layers for name in norms] + [at(backbone, layout.norm)]
    weights = [model.get_input_embeddings().weight, *(module.weight for module in plain)]
    windows = () if attention.window is None else (at(at(x, attention.module), attention.window) for x in layers)
    return (
        *(state(module) for module in modules),
        *((id(weight), weight.data_ptr(), weight.dtype) for weight in weights),
        *(at(module, layout.norm_form.eps) for module in plain),
        *windows,
    )
