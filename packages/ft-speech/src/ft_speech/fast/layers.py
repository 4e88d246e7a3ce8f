"""Whisper's encoder and decoder layers on ft_kernels' norms and products.

The modules are transformers' own (``WhisperEncoderLayer``, ``WhisperDecoderLayer``; Radford et al. 2022,
arXiv:2212.04356): their parameters are read at each call, and each gets its gradient where it wants one. q, k and v are
one product, so are k and v of the audio, and an adapter's update is part of its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ft_kernels as kernels
from ft_core.fast.linears import frozen, read, updates
from ft_core.fast.wide import Wide

__all__ = ["SpeechLayer", "layer_norm"]

LARGEST_FP16 = torch.finfo(torch.float16).max - 1000
"""What transformers clamps the encoder's float16 states to."""


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm by the kernels, in x's dtype."""
    return kernels.layer_norm(x, module.weight, module.bias, module.eps)


class SpeechLayer:
    """One layer's computation, an encoder's or a decoder's.

    Attributes:
        module: transformers' layer.
        wide: its weights with room for updates.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.wide = Wide()
        self.listens = hasattr(module, "encoder_attn")

    def __call__(self, x: Tensor, heard: Tensor | None = None) -> Tensor:
        """The layer's output ``[B, S, H]``.

        Args:
            x: ``[B, S, H]``.
            heard: the encoder's states ``[B, T, H]``, for a decoder's layer.
        """
        layer = self.module
        inner = layer.self_attn
        h = layer_norm(layer.self_attn_layer_norm, x)
        q, k, v = self._products("self", [inner.q_proj, inner.k_proj, inner.v_proj], h, inner.embed_dim)
        q, k, v = (part.unflatten(-1, (-1, inner.head_dim)) for part in (q, k, v))
        out = kernels.packed_attention(q, k, v, causal=self.listens, scale=inner.scaling)
        x = x + self._product("self.out", inner.out_proj, out.flatten(-2))
        if heard is not None:
            x = x + self._heard(layer_norm(layer.encoder_attn_layer_norm, x), heard)
        h = layer_norm(layer.final_layer_norm, x)
        x = x + self._product("fc2", layer.fc2, F.gelu(self._product("fc1", layer.fc1, h)))
        if x.dtype == torch.float16 and not self.listens:
            x = x.clamp(-LARGEST_FP16, LARGEST_FP16)
        return x

    def _heard(self, x: Tensor, heard: Tensor) -> Tensor:
        """Attention over the audio."""
        names = self.module.encoder_attn
        q = self._product("audio.q", names.q_proj, x)
        k, v = self._products("audio.kv", [names.k_proj, names.v_proj], heard, names.embed_dim)
        q, k, v = (part.unflatten(-1, (-1, names.head_dim)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=names.scaling)
        return self._product("audio.out", names.out_proj, out.transpose(1, 2).flatten(-2))

    def _product(self, group: str, module: nn.Module, x: Tensor) -> Tensor:
        return self._products(group, [module], x, None)[0]

    def _products(self, group: str, modules: Sequence[nn.Module], x: Tensor, size: int | None) -> list[Tensor]:
        """The outputs of linear layers of one input, by one product where that can be."""
        known = frozen([read(module) for module in modules])
        if known is None:
            return [module(x) for module in modules]
        dtype = known[0].weight.dtype if isinstance(known[0].weight, Tensor) else None
        if dtype is not None and dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return [module(x) for module in modules]
        a, b, named = updates(known)
        weight = self.wide.of(group, known)
        return list(kernels.lora_qkv(x, weight, a, b, sizes=[linear.sizes[0] for linear in known], **named))
