"""The operations as layers, which hold their settings and weights and nothing else: no state between calls."""

from ft_kernels.nn.activations import GEGLU, SwiGLU
from ft_kernels.nn.attention import PackedAttention
from ft_kernels.nn.lora import LoRALinear
from ft_kernels.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from ft_kernels.nn.norms import AddRMSNorm, LayerNorm, RMSNorm
from ft_kernels.nn.rope import RotaryEmbedding

__all__ = [
    "GEGLU",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "PackedAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
]
