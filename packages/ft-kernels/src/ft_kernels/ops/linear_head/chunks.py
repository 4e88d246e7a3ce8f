"""The head and its loss, some rows at a time: logits, what is made of them in place, and the products with that.

Gradients of the logits are made times a power of two where 16-bit floats would lose small ones (``gradient_scale``),
products with them are added up in fp32, and the factor is taken out when the result is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.cross_entropy.reference import Settings
from ft_kernels.ops.linear_head.plan import (
    Needs,
    Shape,
    WeightWay,
    held_dtype,
    plan_kept,
    plan_rows,
    plan_tiles,
    row_stride,
    weight_way,
)
from ft_kernels.ops.linear_head.products import addmm_into, mm_into, wide_of
from ft_kernels.ops.linear_head.reference import Head
from ft_kernels.ops.linear_head.steps import gradient_step, loss_step, scaled, step_dtype

__all__ = ["Results", "Sums", "backward_rows", "forward_rows", "gradient_scale", "shape_of", "weight_from_kept"]


class Sums(NamedTuple):
    """Gradients, or what will be gradients once multiplied by a factor; None where none is wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


class Results(NamedTuple):
    """For each row its loss, logsumexp, 1 − p(target) and, if asked, entropy and most likely class; gradients.

    ``kept`` is the gradient of all logits, ``[N, row_stride]``, if that is the weight's way.
    """

    losses: Tensor
    lses: Tensor
    rests: Tensor
    entropies: Tensor | None
    best: Tensor | None
    sums: Sums
    kept: Tensor | None


def shape_of(hidden: Tensor, head: Head) -> Shape:
    """The sizes, for planning."""
    rank = 0 if head.a is None else head.a.shape[0]
    kernels = dispatch.use_triton(hidden)
    return Shape(hidden.shape[0], hidden.shape[1], head.weight.shape[0], rank, hidden.dtype, kernels)


def gradient_scale(dtype: torch.dtype, settings: Settings) -> float:
    """What gradients of logits are multiplied by while they are 16-bit: of fp16 the small ones would be cut off."""
    if dtype != torch.float16:
        return 1.0
    steepest = abs(settings.logit_scale / settings.temperature)
    power = 8 - (math.frexp(steepest)[1] if steepest else 0)
    if settings.z_loss:
        # The z-loss makes them steeper by 1 + 2 · z_loss · logsumexp, which only the device knows: the largest there
        # may be, from fp16 logits and 2^32 classes, must not overflow. What that costs, the steepness gives back.
        largest = torch.finfo(dtype).max * abs(settings.logit_scale)
        largest = (min(largest, settings.softcap) if settings.softcap else largest) / settings.temperature + 23
        power = min(power, 15 - math.frexp(steepest * (1 + 2 * settings.z_loss * largest))[1])
    return 2.0**power


def _spans(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, max(step, 1)):
        yield slice(start, min(start + step, count))


def _in_dtype(head: Head, dtype: torch.dtype) -> Head:
    bias, a, b = (None if t is None else t.to(dtype) for t in (head.bias, head.a, head.b))
    return Head(head.weight, bias, a, b, head.scaling)


def _low(h: Tensor, head: Head) -> Tensor | None:
    """``scaling·h·Aᵀ``, rounded once."""
    if head.a is None:
        return None
    low = torch.empty(h.shape[0], head.a.shape[0], dtype=wide_of(h.dtype), device=h.device)
    mm_into(low, h, head.a.t())
    return low.mul_(head.scaling).to(h.dtype)


def _logits_into(buffer: Tensor, h: Tensor, low: Tensor | None, head: Head, columns: slice) -> None:
    weight = head.weight[columns]
    if head.bias is None:
        torch.mm(h, weight.t(), out=buffer)
    else:
        torch.addmm(head.bias[columns], h, weight.t(), out=buffer)
    if low is not None and head.b is not None:
        buffer.addmm_(low, head.b[columns].t())


def _empty_sums(shape: Shape, needs: Needs, way: WeightWay | None, held: Tensor | None, device: torch.device) -> Sums:
    sizes = {
        "weight": (shape.vocabulary, shape.width) if way == "sum" else None,
        "bias": (shape.vocabulary,) if needs.bias else None,
        "a": (shape.rank, shape.width) if needs.a else None,
        "b": (shape.vocabulary, shape.rank) if needs.b else None,
    }
    # The first rows are written, the others added; without rows it is zero.
    make, dtype = torch.empty if shape.rows else torch.zeros, wide_of(shape.dtype)
    made = {k: None if v is None else make(v, dtype=dtype, device=device) for k, v in sizes.items()}
    return Sums(held, **made)


def _add(sums: Sums, dz: Tensor, h: Tensor, low: Tensor | None, head: Head, into: Tensor | None, first: bool) -> None:
    """What follows from the gradient of some rows' logits: added to the sums, or for the rows' own written to into."""
    add = mm_into if first else addmm_into
    down = None
    if head.a is not None and head.b is not None and (into is not None or sums.a is not None):
        down = torch.empty(dz.shape[0], head.b.shape[1], dtype=wide_of(dz.dtype), device=dz.device)
        mm_into(down, dz, head.b)
        down = down.mul_(head.scaling).to(dz.dtype)
    if into is not None:
        mm_into(into, dz, head.weight)
        if down is not None and head.a is not None:
            addmm_into(into, down, head.a)
    if sums.a is not None and down is not None:
        add(sums.a, down.t(), h)
    if sums.b is not None and low is not None:
        add(sums.b, dz.t(), low)
    if sums.bias is not None:
        torch.sum(dz, 0, dtype=sums.bias.dtype, out=sums.bias) if first else sums.bias.add_(
            dz.sum(0, dtype=sums.bias.dtype)
        )
    if sums.weight is not None:
        add(sums.weight, dz.t(), h)


def weight_from_kept(dz: Tensor, hidden: Tensor, factor: Tensor, needs: Needs, max_memory: int, shape: Shape) -> Tensor:
    """The weight's gradient from that of all logits, in the dtype of hidden."""
    dweight = torch.empty(shape.vocabulary, shape.width, dtype=hidden.dtype, device=hidden.device)
    columns = plan_kept(shape, needs, max_memory)
    product = torch.empty(columns, shape.width, dtype=wide_of(hidden.dtype), device=hidden.device)
    for tile in _spans(shape.vocabulary, columns):
        part = product[: tile.stop - tile.start]
        mm_into(part, dz[:, tile].t(), hidden)
        scaled(part, factor, hidden.dtype, shape.kernels, out=dweight[tile])
    return dweight


def forward_rows(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    settings: Settings,
    needs: Needs,
    max_memory: int,
    *,
    entropy: bool = False,
    best: bool = False,
) -> Results:
    """Losses of ``[N, H]`` hidden states and, in the same go, gradients of their sum times ``gradient_scale``.

    The weight's is left out if ``weight_way`` says so; :func:`weight_from_kept` or :func:`backward_rows` makes it then.
    """
    shape, device = shape_of(hidden, head), hidden.device
    head, targets = _in_dtype(head, hidden.dtype), targets.contiguous()  # the kernels read them one after the other
    dtype = step_dtype(hidden)
    losses, lses, rests = (dispatch.allocate((shape.rows,), dtype, device) for _ in range(3))
    way, rows = weight_way(shape, needs, max_memory), plan_rows(shape, needs, max_memory)
    held = torch.empty(hidden.shape, dtype=held_dtype(shape, max_memory), device=device) if needs.hidden else None
    buffer = torch.empty(rows, row_stride(shape), dtype=hidden.dtype, device=device)
    results = Results(
        losses,
        lses,
        rests,
        entropies=dispatch.allocate((shape.rows,), dtype, device) if entropy else None,
        best=torch.empty(shape.rows, dtype=torch.long, device=device) if best else None,
        sums=_empty_sums(shape, needs, way, held, device),
        kept=buffer if way == "kept" else None,
    )
    scale = gradient_scale(hidden.dtype, settings) if any(needs) else None
    for span in _spans(shape.rows, rows):
        h, target = hidden[span], targets[span]
        logits = buffer[: span.stop - span.start, : shape.vocabulary]
        low = _low(h, head)
        _logits_into(logits, h, low, head, slice(None))
        if results.best is not None:
            torch.argmax(logits, -1, out=results.best[span])
        loss_step(
            (results.losses[span], results.lses[span], results.rests[span]), logits, target, settings, shape.kernels,
            entropies=None if results.entropies is None else results.entropies[span], gradient_scale=scale,
        )  # fmt: skip
        if scale is not None:
            into = None if results.sums.hidden is None else results.sums.hidden[span]
            _add(results.sums, logits, h, low, head, into, first=span.start == 0)
    if results.best is not None:
        results.best.masked_fill_(targets == settings.ignore_index, -1)
    return results


def backward_rows(
    grads: Tensor,
    entropy_grads: Tensor | None,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    settings: Settings,
    needs: Needs,
    max_memory: int,
    lses: Tensor,
    rests: Tensor,
    entropies: Tensor | None,
) -> Sums:
    """Gradients from those of each row's loss and entropy; the logits are made again. Each is in its tensor's dtype."""
    shape, device, given = shape_of(hidden, head), hidden.device, head
    head, targets = _in_dtype(head, hidden.dtype), targets.contiguous()
    wide = wide_of(hidden.dtype)
    grads = grads.to(lses.dtype).contiguous()
    entropy_grads = None if entropy_grads is None else entropy_grads.to(lses.dtype).contiguous()
    factor = torch.ones((), dtype=lses.dtype, device=device)
    if hidden.dtype == torch.float16 and grads.numel():
        # The largest gradient from above is made gradient_scale, so that neither small nor large ones are cut off.
        peak = grads.abs().max() if entropy_grads is None else torch.maximum(grads.abs(), entropy_grads.abs()).max()
        peak = torch.where((peak > 0) & peak.isfinite(), peak, 1)
        scale = gradient_scale(hidden.dtype, settings)
        grads, factor = grads * (scale / peak), peak / scale
        entropy_grads = None if entropy_grads is None else entropy_grads * (scale / peak)

    def step(logits: Tensor, span: slice, first: int = 0) -> None:
        gradient_step(
            logits, targets[span], settings, shape.kernels, grads[span],
            None if entropy_grads is None else entropy_grads[span], lses[span], rests[span],
            None if entropies is None else entropies[span], first=first, vocabulary=shape.vocabulary,
        )  # fmt: skip

    way = weight_way(shape, needs, max_memory)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    sums = _empty_sums(shape, needs, way, None, device)
    dweight = None
    if way in ("kept", "sum") or any(needs._replace(weight=False)):
        rows = plan_rows(shape, needs, max_memory)
        buffer = torch.empty(rows, row_stride(shape), dtype=hidden.dtype, device=device)[:, : shape.vocabulary]
        wide_rows = torch.empty(rows, shape.width, dtype=wide, device=device) if needs.hidden else None
        for span in _spans(shape.rows, rows):
            count = span.stop - span.start
            h, logits = hidden[span], buffer[:count]
            low = _low(h, head)
            _logits_into(logits, h, low, head, slice(None))
            step(logits, span)
            into = None if wide_rows is None else wide_rows[:count]
            _add(sums, logits, h, low, head, into, first=span.start == 0)
            if into is not None and dhidden is not None:
                scaled(into, factor, hidden.dtype, shape.kernels, out=dhidden[span])
        if way == "kept":
            dweight = weight_from_kept(buffer, hidden, factor, needs, max_memory, shape)
        del buffer, wide_rows
    if sums.weight is not None:
        dweight = scaled(sums.weight, factor, hidden.dtype, shape.kernels)
    elif way == "later":
        dweight = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
        columns, rows = plan_tiles(shape, max_memory)
        buffer = torch.empty(rows * columns, dtype=hidden.dtype, device=device)
        total = torch.empty(columns, shape.width, dtype=wide, device=device)
        for tile in _spans(shape.vocabulary, columns):
            width = tile.stop - tile.start
            part = total[:width]
            for span in _spans(shape.rows, rows):
                h = hidden[span]
                logits = buffer[: (span.stop - span.start) * width].view(-1, width)
                _logits_into(logits, h, _low(h, head), head, tile)
                step(logits, span, tile.start)
                (addmm_into if span.start else mm_into)(part, logits.t(), h)
            scaled(part, factor, hidden.dtype, shape.kernels, out=dweight[tile])
    return Sums(
        dhidden,
        dweight,
        *(
            None if total is None or like is None else scaled(total, factor, like.dtype, shape.kernels)
            for total, like in ((sums.bias, given.bias), (sums.a, given.a), (sums.b, given.b))
        ),
    )
