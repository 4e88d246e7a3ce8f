"""bitsandbytes' 8-bit weights in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ONE_127TH", "dequantize"]

ONE_127TH = 7.874015718698502e-3
"""1/127, rounded to fp32."""


def dequantize(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``quantized · scales · (1/127)`` in fp32, from left to right, rounded to dtype; a scale for each row."""
    return (quantized * scales.reshape(*quantized.shape[:-1], 1) * ONE_127TH).to(dtype)
