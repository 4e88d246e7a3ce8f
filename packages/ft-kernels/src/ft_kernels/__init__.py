"""Fast, exact Triton kernels for training and inference, each beside a plain torch reference."""

from ft_kernels import nn
from ft_kernels.functional import add_rms_norm, cross_entropy, layer_norm, rms_norm, rope

__all__ = ["__version__", "add_rms_norm", "cross_entropy", "layer_norm", "nn", "rms_norm", "rope"]
__version__ = "0.1.0"
