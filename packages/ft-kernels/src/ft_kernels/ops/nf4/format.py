"""The NF4 format of bitsandbytes (MIT licence): what its numbers are, not how it computes them.

Two values share a byte, the first in the high half; ``blocksize`` values in a row share a scale, their largest
magnitude (absmax). With double quantization the scales, less their mean (offset), are stored as 8-bit numbers of the
"dynamic" type, 256 to a scale of their own.

QLoRA: Dettmers et al. 2023, sections 2 and 3 (arXiv:2305.14314). The dynamic type: Dettmers et al. 2022, section 1.3
(arXiv:2110.02861).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCKSIZES", "CODE", "NESTED_BLOCKSIZE", "THRESHOLDS", "dynamic_code", "thresholds"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the sixteen 4-bit numbers stand for, as fractions of absmax."""

THRESHOLDS = (
    -0.8480964303016663, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425, -0.23460739850997925,
    -0.13791173696517944, -0.045525018125772476, 0.03979014977812767, 0.1202552542090416, 0.2035212516784668,
    0.2920137643814087, 0.3893125355243683, 0.5016633868217468, 0.6427869200706482, 0.8614783883094788,
)  # fmt: skip
"""A value becomes the number of thresholds that it is greater than; each is an fp32 number, spelt out.

They are the middles between neighbouring codes, as bitsandbytes' CUDA code has them.
"""

ROUNDED_UP = {-0.8480964303016663: -0.8480963706970215, 0.1202552542090416: 0.120255246758461,
              0.5016633868217468: 0.5016634464263916, 0.8614783883094788: 0.8614784479141235}  # fmt: skip
"""Where bitsandbytes' other backends have a neighbouring fp32 number: they halve a sum in fp32, with ties to even."""


def thresholds(device: torch.device) -> Tensor:
    """``THRESHOLDS`` as bitsandbytes has them on that device."""
    values = THRESHOLDS if device.type == "cuda" else [ROUNDED_UP.get(value, value) for value in THRESHOLDS]
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """The 256 numbers of the dynamic type, in order; shared, never to be written to.

    Seven decades on either side of zero, of which the one from 10⁻ᵏ⁻¹ to 10⁻ᵏ has 2⁶⁻ᵏ numbers: the middles of equal
    parts of its upper nine tenths. Zero and one besides.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        decade: float = 10 ** (exponent - 6)
        values += (decade * middles).tolist() + (-decade * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
