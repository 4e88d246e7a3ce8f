"""The chunked head as registered torch operations, so that ``torch.compile`` and autograd go through it.

Two ways lead to the gradients. Where the rows' losses are only added up (``linear_head_sum``), or only the hidden
states need a gradient, it is made in the forward pass, while the logits are at hand, and backward multiplies it by
what comes from above. Otherwise each row has a factor of its own inside the sums over rows, so that backward makes the
logits again. How the weight's gradient is made depends on the memory: see ``plan.weight_way``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ft_kernels.dispatch import use_triton
from ft_kernels.ops.cross_entropy.reference import Settings
from ft_kernels.ops.linear_head import chunks
from ft_kernels.ops.linear_head.plan import Needs, Shape, held_dtype, row_stride, weight_way
from ft_kernels.ops.linear_head.products import wide_of
from ft_kernels.ops.linear_head.reference import Head
from ft_kernels.ops.linear_head.steps import scaled, step_dtype
from ft_kernels.ops.refusals import refuse_second_derivative

__all__ = ["linear_head_backward_op", "linear_head_kept_op", "linear_head_op", "linear_head_sum_op", "scaled_op"]

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor targets"
_NUMBERS = (
    "float scaling, int ignore_index, float label_smoothing, float softcap, float logit_scale, float z_loss, "
    "float temperature, int max_memory"
)
_NAMES = "linear_cross_entropy and linear_logprob"
_Numbers = tuple[float, int, float, float, float, float, float, int]


def _unpack(
    weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, numbers: Any
) -> tuple[Head, Settings, int]:
    scaling, *settings, max_memory = numbers
    return Head(weight, bias, a, b, scaling), Settings(*settings), max_memory


def _or_empty(like: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An operation gives tensors: an empty one stands for none."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _plainly(device: torch.device) -> torch.autocast:
    """Products in the dtypes that are there: what autocast wants was done before."""
    return torch.autocast(device.type, enabled=False)


@torch.library.custom_op(
    "ft_kernels::linear_head",
    mutates_args=(),
    schema=f"({_TENSORS}, {_NUMBERS}, bool entropy, bool top1, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_head_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    targets: Tensor,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    temperature: float,
    max_memory: int,
    entropy: bool,
    top1: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Each row's loss, logsumexp, 1 − p(target), entropy, most likely class, and the gradient of the hidden states.

    The last three are empty where they are not asked for.
    """
    settings = Settings(ignore_index, label_smoothing, softcap, logit_scale, z_loss, temperature)
    with _plainly(hidden.device):
        r = chunks.forward_rows(
            hidden, Head(weight, bias, a, b, scaling), targets, settings, Needs(hidden=keep), max_memory,
            entropy=entropy, best=top1,
        )  # fmt: skip
    return _or_empty(r.losses, (r.losses, r.lses, r.rests, r.entropies, r.best, r.sums.hidden))


@linear_head_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, targets: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *numbers, entropy, top1, keep = rest
    head, _, max_memory = _unpack(weight, bias, a, b, numbers)
    shape = chunks.shape_of(hidden, head)
    row = targets.new_empty(targets.shape, dtype=step_dtype(hidden))
    return _or_empty(
        row,
        (
            torch.empty_like(row),
            torch.empty_like(row),
            torch.empty_like(row),
            torch.empty_like(row) if entropy else None,
            torch.empty_like(targets) if top1 else None,
            hidden.new_empty(hidden.shape, dtype=held_dtype(shape, max_memory)) if keep else None,
        ),
    )


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, a, b, targets, *numbers, entropy, _, keep = inputs
    _, lses, rests, entropies, best, held = output
    # With the gradient at hand already, an entropy is one to look at.
    ctx.mark_non_differentiable(lses, rests, best, held, *([entropies] if keep else []))
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.numbers, ctx.entropy, ctx.keep, ctx.dtype = numbers, entropy and not keep, keep, hidden.dtype
    if keep:
        ctx.save_for_backward(held)
    else:
        ctx.save_for_backward(hidden, weight, bias, a, b, targets, lses, rests, entropies)


def _backward_rows(ctx: Any, grads: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 12
    entropy_grads = others[2] if ctx.entropy else None
    if grads is None and entropy_grads is None:
        return *(None,) * 5, *rest
    refuse_second_derivative(_NAMES)
    if ctx.keep and grads is not None:
        (held,) = ctx.saved_tensors
        scale = chunks.gradient_scale(ctx.dtype, Settings(*ctx.numbers[1:-1]))
        return scaled_op(held, grads / scale, ctx.dtype), *(None,) * 4, *rest
    hidden, weight, bias, a, b, targets, lses, rests, entropies = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.zeros_like(lses) if grads is None else grads  # only the entropy was used
    made = linear_head_backward_op(
        grads, entropy_grads, hidden, weight, bias, a, b, targets, lses, rests, entropies, *ctx.numbers, needs
    )
    return *(g if need else None for g, need in zip(made, needs, strict=True)), *rest


linear_head_op.register_autograd(_backward_rows, setup_context=_setup_rows)


@torch.library.custom_op(
    "ft_kernels::linear_head_backward",
    mutates_args=(),
    schema=f"(Tensor grads, Tensor? entropy_grads, {_TENSORS}, Tensor lses, Tensor rests, Tensor entropies, {_NUMBERS}"
    ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_head_backward_op(
    grads: Tensor,
    entropy_grads: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    targets: Tensor,
    lses: Tensor,
    rests: Tensor,
    entropies: Tensor,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    temperature: float,
    max_memory: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of hidden states, weight, bias, A and B; empty where they are not needed."""
    settings = Settings(ignore_index, label_smoothing, softcap, logit_scale, z_loss, temperature)
    with _plainly(hidden.device):
        sums = chunks.backward_rows(
            grads, entropy_grads, hidden, Head(weight, bias, a, b, scaling), targets, settings, Needs(*needs),
            max_memory, lses, rests, None if entropy_grads is None else entropies,
        )  # fmt: skip
    return _or_empty(hidden, sums)


@linear_head_backward_op.register_fake
def _(grads: Tensor, entropy_grads: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    given = zip(rest[:5], needs, strict=True)
    return _or_empty(rest[0], tuple(t.new_empty(t.shape) if need else None for t, need in given))


@torch.library.custom_op(
    "ft_kernels::linear_head_sum",
    mutates_args=(),
    schema=f"({_TENSORS}, {_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_head_sum_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    targets: Tensor,
    scaling: float,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    temperature: float,
    max_memory: int,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The sum of the losses, each row's logsumexp and 1 − p(target), and what will be the gradients.

    These are of hidden states, weight, bias, A and B, times ``gradient_scale``, in fp32; empty where not needed. The
    last is the gradient of all logits if the weight's is made of that.
    """
    settings = Settings(ignore_index, label_smoothing, softcap, logit_scale, z_loss, temperature)
    with _plainly(hidden.device):
        r = chunks.forward_rows(hidden, Head(weight, bias, a, b, scaling), targets, settings, Needs(*needs), max_memory)
    return _or_empty(hidden, (r.losses.sum(), r.lses, r.rests, *r.sums, r.kept))


@linear_head_sum_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, targets: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *numbers, flags = rest
    head, _, max_memory = _unpack(weight, bias, a, b, numbers)
    shape, needs = chunks.shape_of(hidden, head), Needs(*flags)
    row = targets.new_empty(targets.shape, dtype=step_dtype(hidden))
    dtypes = [held_dtype(shape, max_memory), *[wide_of(hidden.dtype)] * 4]
    way = weight_way(shape, needs, max_memory)
    wanted = [needs.hidden, way == "sum", needs.bias, needs.a, needs.b]
    sums = tuple(
        hidden.new_empty(t.shape, dtype=dtype) if want and t is not None else None
        for t, dtype, want in zip((hidden, weight, bias, a, b), dtypes, wanted, strict=True)
    )
    kept = hidden.new_empty(shape.rows, row_stride(shape)) if way == "kept" else None
    return _or_empty(hidden, (row.new_empty(()), row, torch.empty_like(row), *sums, kept))


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, a, b, targets, *numbers, needs = inputs
    _, lses, rests, *sums, kept = output
    ctx.mark_non_differentiable(lses, rests, *sums, kept)
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.numbers, ctx.needs = numbers, needs
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, a, b)]
    head, _, max_memory = _unpack(weight, bias, a, b, numbers)
    ctx.way = weight_way(chunks.shape_of(hidden, head), Needs(*needs), max_memory)
    ctx.kept_for = (weight.shape[0], 0 if a is None else a.shape[0], max_memory, needs)
    more: dict[str | None, tuple[Tensor | None, ...]] = {
        "kept": (kept, hidden),
        "later": (hidden, weight, bias, a, b, targets, lses, rests),
    }
    ctx.save_for_backward(*sums, *more.get(ctx.way, ()))


def _backward_sum(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    refuse_second_derivative(_NAMES)
    sums, more = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    settings = Settings(*ctx.numbers[1:-1])
    factor = grad / chunks.gradient_scale(ctx.dtypes[0], settings)
    gradients: list[Tensor | None] = [
        _finish(total, factor, dtype) if need and (i != 1 or ctx.way == "sum") else None
        for i, (total, dtype, need) in enumerate(zip(sums, ctx.dtypes, ctx.needs, strict=True))
    ]
    if ctx.way == "kept":
        gradients[1] = linear_head_kept_op(*more, factor, *ctx.kept_for)
    elif ctx.way == "later":
        *inputs, lses, rests = more
        only_weight = [False, True, False, False, False]
        made = linear_head_backward_op(
            grad.expand(lses.shape), None, *inputs, lses, rests, lses.new_empty(0), *ctx.numbers, only_weight
        )
        gradients[1] = made[1]
    return *gradients, None, *(None,) * 9


@torch.library.custom_op(
    "ft_kernels::linear_head_kept",
    mutates_args=(),
    schema="(Tensor kept, Tensor hidden, Tensor factor, int vocabulary, int rank, int max_memory, bool[] needs)"
    " -> Tensor",
)
def linear_head_kept_op(
    kept: Tensor, hidden: Tensor, factor: Tensor, vocabulary: int, rank: int, max_memory: int, needs: list[bool]
) -> Tensor:
    """The weight's gradient from that of all logits."""
    rows, width = hidden.shape
    shape = Shape(rows, width, vocabulary, rank, hidden.dtype, use_triton(hidden))
    return chunks.weight_from_kept(kept, hidden, factor, Needs(*needs), max_memory, shape)


@linear_head_kept_op.register_fake
def _(kept: Tensor, hidden: Tensor, factor: Tensor, vocabulary: int, *_: Any) -> Tensor:
    return hidden.new_empty(vocabulary, hidden.shape[1])


linear_head_sum_op.register_autograd(_backward_sum, setup_context=_setup_sum)


def _finish(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum times the factor; in its own place if it has the dtype already and no other backward is to come."""
    # A tensor that is being traced is not plain.
    if total.dtype == dtype and type(total) is Tensor and not _graph_is_kept():
        return scaled(total, factor, dtype, use_triton(total), out=total)
    made: Tensor = scaled_op(total, factor, dtype)
    return made


def _graph_is_kept() -> bool:
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


@torch.library.custom_op(
    "ft_kernels::scaled", mutates_args=(), schema="(Tensor x, Tensor factor, ScalarType dtype) -> Tensor"
)
def scaled_op(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times one factor, or one for each row, in that dtype."""
    return scaled(x, factor, dtype, use_triton(x))


@scaled_op.register_fake
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
