"""The operations as plain functions. Each takes torch tensors on any device and gives the same result everywhere."""

from ft_kernels.functional.losses import Reduction, cross_entropy
from ft_kernels.functional.norms import rms_norm

__all__ = ["Reduction", "cross_entropy", "rms_norm"]
