"""Matrix products of 16-bit tensors whose results stay in fp32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["addmm_into", "mm_into", "wide_of"]

CAST = 2**18
"""About how many elements are cast to fp32 at a time, where the product itself cannot give fp32."""


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add up in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def _native(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


@cache
def _adds_natively(device: torch.device) -> bool:
    # Some releases of torch know ``addmm(..., out_dtype=)`` and refuse an fp32 tensor to add to.
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=torch.float16)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, where out has the dtype of a and b or is fp32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif _native(a.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        _add_cast(out.zero_(), a, b)


def addmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, where out has the dtype of a and b or is fp32."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif not _native(a.device):
        _add_cast(out, a, b)
    elif _adds_natively(a.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)


def _add_cast(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` in out's dtype, a part of the longer of a's dimensions at a time."""
    (m, k), n = a.shape, b.shape[1]
    if k >= m:
        step = max(16, CAST // (m + n))
        for start in range(0, k, step):
            out.addmm_(a[:, start : start + step].to(out.dtype), b[start : start + step].to(out.dtype))
    else:
        wide, step = b.to(out.dtype), max(16, CAST // (k + n))
        for start in range(0, m, step):
            out[start : start + step].addmm_(a[start : start + step].to(out.dtype), wide)
