"""Fast, exact Triton kernels for training and inference, each beside a plain torch reference."""

from ft_kernels import nn
from ft_kernels.functional import (
    AttentionPlan,
    NestedScales,
    add_rms_norm,
    cross_entropy,
    fp8_quantize,
    geglu,
    int8_dequantize,
    layer_norm,
    linear_cross_entropy,
    linear_logprob,
    nf4_dequantize,
    nf4_quantize,
    packed_attention,
    plan_attention,
    rms_norm,
    rope,
    swiglu,
)

__all__ = [
    "AttentionPlan",
    "NestedScales",
    "__version__",
    "add_rms_norm",
    "cross_entropy",
    "fp8_quantize",
    "geglu",
    "int8_dequantize",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "nf4_dequantize",
    "nf4_quantize",
    "nn",
    "packed_attention",
    "plan_attention",
    "rms_norm",
    "rope",
    "swiglu",
]
__version__ = "0.1.0"
