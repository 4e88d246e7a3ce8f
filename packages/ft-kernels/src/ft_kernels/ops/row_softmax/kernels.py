"""What kernels over rows of logits are made of; ``ops.cross_entropy.kernels`` says what each symbol means."""

from __future__ import annotations

import triton
import triton.language as tl

from ft_kernels.dispatch import interpreting

__all__ = ["changed", "exp_wide", "fold", "narrowed", "plain_gradient", "slope"]

_BY_HAND = tl.constexpr(interpreting())


@triton.jit
def changed(x, scale, softcap, height, CAPPED: tl.constexpr):
    """height·tanh(scale·x / softcap); without a cap, scale·x."""
    x = x * scale
    if CAPPED:
        # tanh|a| = (1 − e)/(1 + e) with e = exp(−2|a|), which cannot overflow.
        e = tl.exp(tl.abs(x) * (-2.0 / softcap))
        x = height * tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    return x


@triton.jit
def slope(x, scale, softcap, height, CAPPED: tl.constexpr):
    """The derivative of ``changed``: scale·(1 − tanh²) = scale·4e/(1 + e)², which does not cancel near the cap."""
    slope = scale
    if CAPPED:
        e = tl.exp(tl.abs(x * scale) * (-2.0 / softcap))
        slope = scale * (height / softcap) * 4.0 * e / ((1.0 + e) * (1.0 + e))
    return slope


@triton.jit
def exp_wide(d):
    """exp of d ≤ 0 in fp64, right to about 1e-8, a sixth of fp32's rounding, for a third of a full exp's cost:

    d = n·ln 2 + f with |f| ≤ 0.35, and exp f = 1 + f + f²·q(f), whose last and small part is computed in fp32. An fp32
    exp, with its error of an ulp or two, would be the largest error of all.
    """
    near = tl.where(d < -200.0, -200.0, d)
    n = tl.floor(near.to(tl.float32) * 1.44269504 + 0.5)
    f = near - n.to(tl.float64) * 0.6931471805599453
    h = f.to(tl.float32)
    q = h * (1.0 / 40320) + 1.0 / 5040
    q = h * q + 1.0 / 720
    q = h * q + 1.0 / 120
    q = h * q + 1.0 / 24
    q = h * q + 1.0 / 6
    q = h * q + 0.5
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)  # 2 to the n, by its bits
    return tl.where(d < -200.0, 0.0, ((h * h * q).to(tl.float64) + f + 1.0) * power)


@triton.jit
def narrowed(value, like):
    """The value in the dtype of what ``like`` points to, rounded to nearest; triton's interpreter cuts bf16 off."""
    value = value.to(tl.float32)
    if _BY_HAND:  # noqa: SIM102 - two compile-time conditions
        if like.dtype.element_ty == tl.bfloat16:
            bits = value.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(like.dtype.element_ty)


@triton.jit
def fold(z, maximum, sums, weighted, WIDE: tl.constexpr, ENTROPY: tl.constexpr):
    """Take a tile of z into each lane's maximum, Σ exp(z − maximum) and Σ exp(z − maximum)·(z − maximum)."""
    higher = tl.maximum(maximum, tl.max(tl.max(z, 2), 0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    d = z - shift[None, :, None]
    e = exp_wide(d) if tl.float64 == WIDE else tl.exp(d)
    before = tl.exp(maximum - shift)
    if ENTROPY:
        # A sum that is 0 stands beside an infinite distance, as does an exponential that is 0.
        moved = tl.where(sums == 0.0, 0.0, (maximum - shift) * sums)
        now = tl.where(e == 0.0, 0.0, e * d)
        weighted = (weighted + moved) * before + tl.sum(tl.sum(now, 2), 0)
    sums = sums * before + tl.sum(tl.sum(e, 2), 0)
    return higher, sums, weighted


@triton.jit
def plain_gradient(
    x, lse, factor, shared, scale, softcap, height,
    SMOOTHED: tl.constexpr, CHANGED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of logits none of which is the target."""
    z = x
    if CHANGED:
        z = changed(x, scale, softcap, height, CAPPED)
    dz = (exp_wide(z - lse) if tl.float64 == WIDE else tl.exp(z - lse)) * factor
    if SMOOTHED:
        dz -= shared
    if CHANGED:
        dz *= slope(x, scale, softcap, height, CAPPED)
    return dz
