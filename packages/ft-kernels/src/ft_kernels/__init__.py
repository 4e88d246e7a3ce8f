"""Fast, exact Triton kernels for training and inference, each beside a plain torch reference."""

from ft_kernels import nn
from ft_kernels.functional import cross_entropy, rms_norm

__all__ = ["__version__", "cross_entropy", "nn", "rms_norm"]
__version__ = "0.1.0"
