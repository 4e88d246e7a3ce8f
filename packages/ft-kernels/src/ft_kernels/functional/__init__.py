"""The operations as plain functions. Each takes torch tensors on any device and gives the same result everywhere."""

from ft_kernels.functional.losses import Reduction, cross_entropy
from ft_kernels.functional.norms import add_rms_norm, layer_norm, rms_norm
from ft_kernels.functional.rope import RopeLayout, rope

__all__ = ["Reduction", "RopeLayout", "add_rms_norm", "cross_entropy", "layer_norm", "rms_norm", "rope"]
