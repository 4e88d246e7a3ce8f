"""Gated linear units in Triton: h = u·a(x) for gate x and up u, with a(x) = x·s(x).

    silu        s = σ(x)
    gelu        s = Φ(x), the normal distribution
    gelu_tanh   s = σ(2·sqrt(2/π)·(x + 0.044715·x³)), which is ½(1 + tanh(half of that))

    dx = dh·u·a'(x)        du = dh·a(x)        a' = s + x·s'

σ and Φ are made so that both s and 1 − s are right to the last digits: with e = exp(−|v|), σ(v) and 1 − σ(v) are
1/(1 + e) and e/(1 + e) or the reverse, and Φ(−|x|) = φ(x)·m(|x|) with Mills' ratio m, a polynomial of 1/(1 + |x|/4)
right to 1.5e-9. torch computes Φ as ½(1 + erf), of which nothing is left at x = −6.

16-bit tensors are computed in fp32, fp32 ones in fp64 with an exponential right to 1e-8, a sixth of fp32's rounding.
Nothing but the inputs is kept for the backward pass. It may write over them: each element is read before it is written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import Rows, cdiv, launch, power_of_2
from ft_kernels.ops.glu.reference import halves
from ft_kernels.ops.row_softmax.kernels import exp_wide

__all__ = ["backward", "forward"]

TILE = 2048
"""Elements of each tensor that a program works on."""


@triton.jit
def _exp(d, WIDE: tl.constexpr):
    """exp of d ≤ 0."""
    return exp_wide(d) if tl.float64 == WIDE else tl.exp(d)


@triton.jit
def _reciprocal(d, WIDE: tl.constexpr):
    """1/d for d ≥ 1; in fp64 by one Newton step from the fp32 result, right to 1e-13."""
    if tl.float64 == WIDE:
        near = (1.0 / d.to(tl.float32)).to(tl.float64)
        r = near * (2.0 - d * near)
        r = tl.where(near == 0.0, near, r)  # d is infinite
    else:
        r = 1.0 / d
    return r


@triton.jit
def _sigmoid(v, WIDE: tl.constexpr):
    """σ(v) and 1 − σ(v), each with a small relative error."""
    e = _exp(-tl.abs(v), WIDE)
    large = _reciprocal(1.0 + e, WIDE)
    small = e * large
    return tl.where(v < 0, small, large), tl.where(v < 0, large, small)


@triton.jit
def _activation_alone(x, KIND: tl.constexpr, WIDE: tl.constexpr):
    """a(x). Without a slope 1 − s is not needed: in fp32 1/(1 + exp(−v)) is right to the last digits for either sign,
    but for what is under 2⁻¹²⁷, and an x whose square overflows has s of 0 or 1."""
    if tl.float64 == WIDE or KIND == 1:
        active = _activation(x, KIND, WIDE)[0]
    elif KIND == 0:
        active = x / (1.0 + tl.exp(-x))
    else:
        active = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    return active


@triton.jit
def _normal(x, WIDE: tl.constexpr):
    """Φ(x) and φ(x), each with a small relative error."""
    density = _exp(-0.5 * x * x, WIDE) * 0.3989422804014327
    t = _reciprocal(1.0 + 0.25 * tl.abs(x), WIDE)
    # A weighted least-squares fit to sqrt(π/2)·erfcx(|x|/√2)/t, made for this.
    m = t * -0.026240192332181805 + 0.14349176705762934
    m = t * m - 0.28808174292833466
    m = t * m + 0.2445649106468003
    m = t * m - 0.12667229202674574
    m = t * m + 0.11223668548795007
    m = t * m + 0.09557427188787923
    m = t * m + 0.16110159673877855
    m = t * m + 0.20295672341452928
    m = t * m + 0.2343825419787048
    m = t * m + 0.2499998688885528
    m = t * m + 0.2500000003732377
    tail = density * (t * m)
    return tl.where(x < 0, tail, 1.0 - tail), density


@triton.jit
def _activation(x, KIND: tl.constexpr, WIDE: tl.constexpr):
    """a(x) and a'(x)."""
    if KIND == 0:
        s, rest = _sigmoid(x, WIDE)
        slope = s * (1.0 + x * rest)
    elif KIND == 1:
        s, density = _normal(x, WIDE)
        slope = s + x * density
    else:
        # Beyond ±100 s is 0 or 1 and s' is 0: the bound keeps x³ from overflowing.
        near = tl.minimum(tl.maximum(x, -100.0), 100.0)
        square = near * near
        s, rest = _sigmoid(1.5957691216057308 * near * (1.0 + 0.044715 * square), WIDE)
        slope = s + x * (s * rest * (1.5957691216057308 * (1.0 + 0.134145 * square)))
    return x * s, slope


@triton.jit
def _starts(base, rows, inner, outer_stride, inner_stride, SPLIT: tl.constexpr):
    starts = rows * inner_stride
    if SPLIT:  # a 64-bit division: only where a tensor's rows have two strides
        starts += (rows // inner) * (outer_stride - inner * inner_stride)
    return base + starts[:, None]


@triton.jit
def _rounded(value, target):
    # By way of fp32: triton's interpreter does not know fp64 to bf16.
    return value.to(tl.float32).to(target.dtype.element_ty)


@triton.jit
def _forward(
    gate, gate_inner, gate_outer, gate_stride, up, up_inner, up_outer, up_stride,
    out, out_inner, out_outer, out_stride, N, WIDTH,
    KIND: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(WIDTH, BLOCK)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = ((tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < N)[:, None] & (cols < WIDTH)
    x = tl.load(_starts(gate, rows, gate_inner, gate_outer, gate_stride, SPLIT) + cols, mask=mask, other=0.0).to(WIDE)
    u = tl.load(_starts(up, rows, up_inner, up_outer, up_stride, SPLIT) + cols, mask=mask, other=0.0).to(WIDE)
    h = _activation_alone(x, KIND, WIDE) * u
    tl.store(_starts(out, rows, out_inner, out_outer, out_stride, SPLIT) + cols, _rounded(h, out), mask=mask)


@triton.jit
def _backward(
    dh, dh_inner, dh_outer, dh_stride, gate, gate_inner, gate_outer, gate_stride, up, up_inner, up_outer, up_stride,
    dgate, dgate_inner, dgate_outer, dgate_stride, dup, dup_inner, dup_outer, dup_stride,
    h, h_inner, h_outer, h_stride, N, WIDTH,
    KIND: tl.constexpr, WITH_H: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(WIDTH, BLOCK)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = ((tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (rows < N)[:, None] & (cols < WIDTH)
    x = tl.load(_starts(gate, rows, gate_inner, gate_outer, gate_stride, SPLIT) + cols, mask=mask, other=0.0).to(WIDE)
    u = tl.load(_starts(up, rows, up_inner, up_outer, up_stride, SPLIT) + cols, mask=mask, other=0.0).to(WIDE)
    d = tl.load(_starts(dh, rows, dh_inner, dh_outer, dh_stride, SPLIT) + cols, mask=mask, other=0.0).to(WIDE)
    active, slope = _activation(x, KIND, WIDE)
    place = _starts(dgate, rows, dgate_inner, dgate_outer, dgate_stride, SPLIT) + cols
    tl.store(place, _rounded(d * u * slope, dgate), mask=mask)
    place = _starts(dup, rows, dup_inner, dup_outer, dup_stride, SPLIT) + cols
    tl.store(place, _rounded(d * active, dup), mask=mask)
    if WITH_H:
        tl.store(_starts(h, rows, h_inner, h_outer, h_stride, SPLIT) + cols, _rounded(active * u, h), mask=mask)


@cache
def _tiling(width: int, wide: torch.dtype, tile: int = TILE) -> dict[str, Any]:
    """A tile of whole or part rows; the widest block that wastes little on the last one of a row."""
    block = min(power_of_2(max(width, 1)), tile)
    if width > tile and cdiv(width, tile) * tile > width * 1.05:
        block = max(tile // 4, 512)
    warps = tile // (128 if wide == torch.float64 else 512)
    return {"BLOCK": block, "ROWS": max(1, tile // block), "num_warps": min(16, max(1, warps))}


@cache
def _candidates(width: int, wide: torch.dtype) -> list[dict[str, Any]]:
    return [_tiling(width, wide, tile) | {"num_warps": w} for tile in (1024, 2048, 4096) for w in (4, 8, 16)]


def _settings(name: str, rows: list[Rows], kind: int, dtype: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and everything about a launch but the tensors."""
    device, width = rows[0].tensor.device, rows[0].tensor.shape[-1]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    settings = tuning.settings(
        name, device, (kind, width, dtype), default=_tiling(width, wide), candidates=_candidates(width, wide)
    )  # fmt: skip
    grid = cdiv(rows[0].count, settings["ROWS"]) * cdiv(width, settings["BLOCK"])
    return (grid,), {
        "KIND": kind,
        "SPLIT": any(r.layout[0] != r.count for r in rows),
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        **settings,
    }


def _writable(tensor: Tensor) -> tuple[Rows, Tensor]:
    """Rows to write to, which are the tensor's own unless its layout is one that kernels cannot follow."""
    rows = Rows(tensor)
    if rows.tensor is not tensor:
        rows = Rows(dispatch.allocate(tensor.shape, tensor.dtype, tensor.device))
    return rows, tensor


def _deliver(written: list[tuple[Rows, Tensor]]) -> None:
    for rows, tensor in written:
        if rows.tensor is not tensor:
            tensor.copy_(rows.tensor)


def forward(gate: Tensor, up: Tensor | None, kind: int, out: Tensor | None = None) -> Tensor:
    """h = activation(gate)·up, into ``out`` (any strides) or a new contiguous tensor.

    Args:
        gate: ``[..., I]``, or ``[..., 2·I]`` with up in its second half.
        up: ``[..., I]`` or None for a packed gate.
        kind: the activation's number in ``reference.KINDS``.
        out: ``[..., I]``.
    """
    gate, up = halves(gate, up)
    if out is None:
        out = dispatch.allocate(gate.shape, gate.dtype, gate.device)
    if out.numel() == 0:
        return out
    written = _writable(out)
    rows = [Rows(gate), Rows(up), written[0]]
    grid, settings = _settings("glu_forward", rows, kind, gate.dtype)
    arguments = [a for r in rows for a in (r.tensor, *r.layout)]
    launch("glu_forward", _forward, grid, gate.device, *arguments, rows[0].count, gate.shape[-1], **settings)
    _deliver([written])
    return out


def backward(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: int,
    *,
    dgate: Tensor | None = None,
    dup: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up in one pass, and if wanted h once more.

    Args:
        dh: ``[..., I]``, the gradient of h.
        gate, up, kind: as forward had them.
        dgate, dup: ``[..., I]``, where to write, any strides; the very gate and up may be given (for a packed gate
            ``reference.halves`` of it), to be written over. None for new contiguous tensors.
        h: ``[..., I]``, where to write the output once more, any strides; None not to.

    Returns:
        dgate and dup.
    """
    gate, up = halves(gate, up)
    if dgate is None:
        dgate = dispatch.allocate(gate.shape, gate.dtype, gate.device)
    if dup is None:
        dup = dispatch.allocate(gate.shape, gate.dtype, gate.device)
    if gate.numel() == 0:
        return dgate, dup
    written = [_writable(t) for t in ((dgate, dup) if h is None else (dgate, dup, h))]
    rows = [Rows(dh), Rows(gate), Rows(up), *(w[0] for w in written)]
    if h is None:
        rows.append(rows[-1])  # a place that is not written
    grid, settings = _settings("glu_backward", rows, kind, gate.dtype)
    arguments = [a for r in rows for a in (r.tensor, *r.layout)]
    launch(
        "glu_backward", _backward, grid, gate.device,
        *arguments, rows[0].count, gate.shape[-1], WITH_H=h is not None, **settings,
    )  # fmt: skip
    _deliver(written)
    return dgate, dup
