"""Fast, exact Triton kernels for training and inference, each beside a plain torch reference."""

from ft_kernels import nn
from ft_kernels.functional import (
    NestedScales,
    add_rms_norm,
    cross_entropy,
    fp8_quantize,
    geglu,
    int8_dequantize,
    layer_norm,
    nf4_dequantize,
    nf4_quantize,
    rms_norm,
    rope,
    swiglu,
)

__all__ = [
    "NestedScales",
    "__version__",
    "add_rms_norm",
    "cross_entropy",
    "fp8_quantize",
    "geglu",
    "int8_dequantize",
    "layer_norm",
    "nf4_dequantize",
    "nf4_quantize",
    "nn",
    "rms_norm",
    "rope",
    "swiglu",
]
__version__ = "0.1.0"
