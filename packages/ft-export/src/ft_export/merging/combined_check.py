"""A combined adapter against the adapters that it is of, in float64 from their files, without PEFT.

What a combination of LoRA adapters stands for is compared with S, the weighted sum of their changes
``w_i s_i B_i A_i``. Its products are never formed: with the B's side by side and the A's, scaled, below each other a
sum of products is one product, and the Frobenius norm of that is the norm of ``R A``, R from the QR decomposition of
the B's.

- ``cat`` has to be S: what it may be off is the rounding of A in fp32, at most ``8 u sum |w_i s_i| |B_i| |A_i|``.
- ``svd`` has to be the nearest matrix to S of its rank: off by the singular values that it leaves out (Eckart and
  Young 1936), and by fp32's own error in finding them.
- ``linear`` has to be the sum of the A's times the sum of the B's, each with the root of its weight: value for value.
- the others drop values by rules (TIES) or by chance (DARE). They are compared with PEFT's own model only, in what they
  say (``ft_export.merging.logprobs_check``).

How far each is from S is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.merging.adapter import UNIT, Adapter, LowRank
from ft_export.merging.combination import Combination, Part

if TYPE_CHECKING:
    import torch

__all__ = ["check_combined"]

SVD_ERROR = 2.0**-12
"""What fp32's decomposition may be off, relative to the largest singular value; 9e-6 measured on weights of 512 x 1024,
and it grows with their size."""


def check_combined(combined: Adapter, parts: Sequence[Part], how: Combination) -> dict[str, Any]:
    """Compare a combined adapter with its parts.

    Returns:
        ``tensors``, how many were compared; ``checked``, whether against a bound; ``from_the_sum``, the distance from
        the weighted sum of the changes, relative to its size (Frobenius norms over all weights).

    Raises:
        ExportError: a weight is missing or not what it has to be, or holds values that are not finite.
    """
    import torch

    asked = {name for part in parts for name in part.changes}
    if asked != set(combined.changes):
        odd = sorted(asked ^ set(combined.changes))[0]
        raise ExportError(f"the combined adapter and its parts do not change the same weights: {odd}")
    away = size = 0.0
    for name in sorted(asked):
        change = combined.changes[name]
        assert isinstance(change, LowRank)
        low, high = (combined.files.tensor(change.parts[which]).double() for which in ("A", "B"))
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ExportError(f"{name} of the combined adapter holds values that are not finite: an adapter is broken")
        own = [(part, part.changes[name]) for part in parts if name in part.changes]
        lows = [part.weight * c.scale * part.low(c).double() for part, c in own]
        highs = [part.high(c).double() for part, c in own]
        outer = torch.linalg.qr(torch.cat([high, *highs], 1), mode="r")[1]
        distance = _norm(outer @ torch.cat([change.scale * low, *(-a for a in lows)]))
        total = outer[:, high.shape[1] :] @ torch.cat(lows)
        away, size = math.hypot(away, distance), math.hypot(size, _norm(total))
        if how.type == "cat":
            allowed = 8 * UNIT * sum(_norm(a) * _norm(b) for a, b in zip(lows, highs, strict=True))
            _within(name, distance, allowed, "the weighted sum of the adapters' changes")
        elif how.type == "svd":
            values = torch.linalg.svdvals(total)
            allowed = _norm(values[low.shape[0] :]) + SVD_ERROR * float(values.max())
            _within(name, distance, allowed, f"the nearest to the weighted sum of rank {low.shape[0]}")
        elif how.type == "linear":
            _check_linear(name, change.scale, (low, high), own)
    return {
        "tensors": len(asked),
        "checked": how.type in ("cat", "svd", "linear"),
        "from_the_sum": away / size if size else 0.0,
    }


def _check_linear(
    name: str, scale: float, found: tuple[torch.Tensor, torch.Tensor], own: Sequence[tuple[Part, LowRank]]
) -> None:
    """PEFT's ``linear``: the root of the weight goes to each side, its sign to A."""
    import torch

    if scale != 1:
        raise ExportError(f"{name} of the combined adapter has the scale {scale}, not 1")
    for which, value in zip(("A", "B"), found, strict=True):
        exact, sizes = torch.zeros_like(value), torch.zeros_like(value)
        for part, change in own:
            weight = part.weight * change.scale
            root = math.sqrt(abs(weight)) * (math.copysign(1, weight) if which == "A" else 1)
            term = root * (part.low(change) if which == "A" else part.high(change)).double()
            exact, sizes = exact + term, sizes + term.abs()
        worst = float(((value - exact).abs() - (len(own) + 3) * UNIT * sizes).max())
        if not worst <= 0:
            raise ExportError(f"lora_{which} of {name} is not the sum of the adapters' with the roots of their weights")


def _within(name: str, distance: float, allowed: float, what: str) -> None:
    # written so that a distance that is no number fails
    if not distance <= allowed:
        raise ExportError(f"{name} of the combined adapter is not {what}: off by {distance:.3g} (bound {allowed:.3g})")


def _norm(value: torch.Tensor) -> float:
    """Of Frobenius: the root of the sum of squares."""
    return float(value.norm())
