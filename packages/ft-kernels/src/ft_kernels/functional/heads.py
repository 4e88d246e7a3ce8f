"""Losses and log-probabilities from hidden states and a head; the logits are never whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ft_kernels.functional.losses import Reduction, check_reduction, check_settings
from ft_kernels.ops.linear_head import chunks
from ft_kernels.ops.linear_head.autograd import linear_head_op, linear_head_sum_op
from ft_kernels.ops.linear_head.plan import Needs, least_memory
from ft_kernels.ops.linear_head.reference import Head

__all__ = ["Lora", "TokenLogProbs", "linear_cross_entropy", "linear_logprob"]

Lora = tuple[Tensor, Tensor, float]
"""A low-rank update of a head: A ``[r, H]``, B ``[V, r]`` and the factor, which is PEFT's ``scaling``."""


class TokenLogProbs(NamedTuple):
    """What :func:`linear_logprob` gives when it is asked for more than log-probabilities.

    Attributes:
        logprobs: ``[...]``.
        entropy: ``[...]``, of each distribution, in nats, differentiable unless asked for ``"detached"``; None if not
            asked for.
        top1: ``[...]``, the most likely class of each, −1 where the target is ignored; None if not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    top1: Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    max_memory: int = 2**30,
) -> Tensor:
    """``cross_entropy(hidden @ weightᵀ + bias, targets)`` without ever holding all logits.

    Logits are made for some rows at a time, in the dtype of hidden, turned into losses and, in place, into their
    gradient, which goes into the products that need it and is gone. The idea of computing the gradient in the forward
    pass is that of Liger (arXiv:2410.10989) and Cut Cross-Entropy (arXiv:2411.09009). For the loss itself see
    :func:`ft_kernels.cross_entropy`.

    Whatever needs a gradient gets one: hidden, weight, bias and the low-rank update. A frozen head costs nothing
    beyond hidden's gradient. Sums over rows are kept in fp32 and rounded once.

    With ``reduction="none"`` and anything but hidden to train, backward makes the logits again: one matrix product
    more. So it does for the gradient of a weight trained in 16 bit if ``max_memory`` has room neither for all logits'
    gradient (2 bytes an element), which is fastest, nor for an fp32 sum as large as the weight (4 bytes an element).

    Args:
        hidden: ``[..., H]``, floating point.
        weight: ``[V, H]``, the head, in the dtype of hidden (both are cast under autocast).
        targets: ``[...]``, integers from 0 to V − 1, or ``ignore_index``.
        bias: ``[V]``, or None.
        lora: ``(A [r, H], B [V, r], scaling)``, a low-rank update of the head: ``scaling · (hidden·Aᵀ)·Bᵀ`` is added to
            the logits. Like the bias it may have another dtype; it is cast to that of hidden for the products.
        ignore_index: rows with this target give no loss and a gradient of zero.
        label_smoothing: from 0 to 1.
        softcap: a positive bound on the logits, or None.
        logit_scale: multiplies the logits, before the softcap; positive.
        z_loss: weight of the squared logsumexp, at least 0.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"`` for one loss a row.
        max_memory: bytes that may be used at any time beyond the arguments and the gradients returned. Not counted
            are the matrix library's own workspace, a copy of hidden if its rows are not evenly spaced, one of targets
            that have gaps or are not int64, and autocast's copies of hidden and weight in its dtype.

    Returns:
        A scalar, or ``[...]`` for ``"none"``; in fp32, in float64 for float64 inputs. Where every row is ignored or
        there is none, the sum is 0 and the mean is nan, with zero gradients.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes, devices, settings or ``max_memory`` do not fit.
        RuntimeError: in backward, if the gradient is to be differentiated again (``create_graph=True``).
    """
    where = "linear_cross_entropy"
    check_settings(where, softcap, logit_scale, label_smoothing, z_loss)
    check_reduction(where, reduction)
    given = _Inputs.prepared(where, hidden, weight, targets, bias, lora, max_memory)
    numbers = (
        given.head.scaling, ignore_index, float(label_smoothing), float(softcap or 0.0), float(logit_scale),
        float(z_loss), 1.0, max_memory,
    )  # fmt: skip
    dtype = torch.promote_types(given.hidden.dtype, torch.float32)
    if reduction == "none":
        keep = given.needs == Needs(hidden=True)
        losses: Tensor = linear_head_op(*given.tensors, *numbers, False, False, keep)[0]
        return losses.to(dtype).view(targets.shape)
    total: Tensor = linear_head_sum_op(*given.tensors, *numbers, list(given.needs))[0]
    if reduction == "mean":
        total = total / (given.targets != ignore_index).sum()
    return total.to(dtype)


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., lora: Lora | None = ...,
    ignore_index: int = ..., temperature: float = ..., softcap: float | None = ..., logit_scale: float = ...,
    entropy: Literal[False] = ..., top1: Literal[False] = ..., max_memory: int = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ..., lora: Lora | None = ...,
    ignore_index: int = ..., temperature: float = ..., softcap: float | None = ..., logit_scale: float = ...,
    entropy: bool | Literal["detached"] = ..., top1: bool = ..., max_memory: int = ...,
) -> Tensor | TokenLogProbs: ...  # fmt: skip
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool | Literal["detached"] = False,
    top1: bool = False,
    max_memory: int = 2**30,
) -> Tensor | TokenLogProbs:
    """The log-probability of each target under ``softmax(hidden @ weightᵀ)``, without ever holding all logits.

    What policy-gradient losses need (PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300). Differentiable in hidden, weight,
    bias and the low-rank update, with any gradient from above. If hidden alone needs a gradient and the entropy needs
    none, it is made in the forward pass; otherwise backward makes the logits again.

    Args:
        hidden, weight, bias, lora, softcap, logit_scale, max_memory: as :func:`linear_cross_entropy` has them.
        targets: ``[...]``, integers from 0 to V − 1, or ``ignore_index``.
        ignore_index: rows with this target give a log-probability and an entropy of 0, and a gradient of zero.
        temperature: divides the logits, after the softcap; positive.
        entropy: whether to give each distribution's entropy too. It is differentiable; ``"detached"`` gives one that is
            only to be looked at, which costs next to nothing.
        top1: whether to give the number of each most likely class too (the first, if several are equally likely).

    Returns:
        ``[...]`` log-probabilities in fp32 (float64 for float64 inputs); a :class:`TokenLogProbs` if entropy or top1 is
        asked for.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes, devices, settings or ``max_memory`` do not fit.
        RuntimeError: in backward, if the gradient is to be differentiated again (``create_graph=True``).
    """
    where = "linear_logprob"
    if entropy not in (True, False, "detached"):
        raise ValueError(f"{where}: entropy={entropy!r}; allowed are True, False and 'detached'")
    check_settings(where, softcap, logit_scale)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature={temperature}; allowed is a positive number")
    given = _Inputs.prepared(where, hidden, weight, targets, bias, lora, max_memory)
    numbers = (
        given.head.scaling, ignore_index, 0.0, float(softcap or 0.0), float(logit_scale), 0.0, float(temperature),
        max_memory,
    )  # fmt: skip
    keep = given.needs == Needs(hidden=True) and entropy is not True
    losses, _, _, entropies, best, _ = linear_head_op(*given.tensors, *numbers, bool(entropy), top1, keep)
    if entropy == "detached":
        entropies = entropies.detach()
    dtype = torch.promote_types(given.hidden.dtype, torch.float32)
    logprobs: Tensor = (0.0 - losses).to(dtype).view(targets.shape)
    if not (entropy or top1):
        return logprobs
    return TokenLogProbs(
        logprobs,
        entropies.to(dtype).view(targets.shape) if entropy else None,
        best.view(targets.shape) if top1 else None,
    )


class _Inputs(NamedTuple):
    """Checked and flattened."""

    hidden: Tensor
    targets: Tensor
    head: Head
    needs: Needs

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.head.weight, self.head.bias, self.head.a, self.head.b, self.targets

    @classmethod
    def prepared(
        cls, where: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lora: Lora | None,
        max_memory: int,
    ) -> _Inputs:  # fmt: skip
        _check_kinds(where, lora, max_memory)
        a, b, scaling = lora if lora is not None else (None, None, 1.0)
        _check_dtypes(where, hidden, weight, targets, bias, a, b)
        _check_shapes(where, hidden, weight, targets, bias, a, b)
        if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if hidden.dtype != weight.dtype:
            raise TypeError(
                f"{where}: hidden has dtype {hidden.dtype}, weight {weight.dtype}; cast one of them, or use autocast"
            )
        training = torch.is_grad_enabled()
        needs = Needs(*(training and t is not None and t.requires_grad for t in (hidden, weight, bias, a, b)))
        flat = hidden.reshape(-1, hidden.shape[-1])
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        head = Head(weight, bias, a, b, float(scaling))
        least = least_memory(chunks.shape_of(flat, head), needs)
        if max_memory < least:
            raise ValueError(
                f"{where}: max_memory={max_memory} bytes is too little for hidden {list(hidden.shape)} and weight "
                f"{list(weight.shape)}; give at least {least}"
            )
        return cls(flat, targets.reshape(-1).long(), head, needs)


def _check_kinds(where: str, lora: Any, max_memory: Any) -> None:
    if lora is not None and (not isinstance(lora, Sequence) or len(lora) != 3):
        given = f"has {len(lora)} items" if isinstance(lora, Sequence) else f"is a {type(lora).__name__}"
        raise TypeError(f"{where}: lora {given}; give three, (A [r, H], B [V, r], scaling)")
    if not isinstance(max_memory, int):
        raise TypeError(f"{where}: max_memory={max_memory!r}; give a whole number of bytes, such as 2**30")


def _check_dtypes(
    where: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> None:
    named = {"hidden": hidden, "weight": weight, "bias": bias, "lora's A": a, "lora's B": b}
    for name, tensor in named.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{where}: {name} has dtype {tensor.dtype}; use a floating-point dtype")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"{where}: targets have dtype {targets.dtype}; use class numbers of an integer dtype")
    for name, tensor in {**named, "targets": targets}.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{where}: hidden is on {hidden.device}, {name} on {tensor.device}; use one device")


def _check_shapes(
    where: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> None:
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.numel():
        raise ValueError(
            f"{where}: hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit; "
            "use [..., H] and [V, H], H and V from 1"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where}: hidden {list(hidden.shape)} and targets {list(targets.shape)} do not fit; "
            "targets need the shape of hidden without the last dimension"
        )
    vocabulary, width = weight.shape
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"{where}: bias has shape {list(bias.shape)}; weight needs [{vocabulary}]")
    if a is not None and b is not None:
        rank = a.shape[0] if a.dim() else 0
        if not rank or a.shape != (rank, width) or b.shape != (vocabulary, rank):
            raise ValueError(
                f"{where}: lora's A {list(a.shape)} and B {list(b.shape)} do not fit weight {list(weight.shape)}; "
                f"use [r, {width}] and [{vocabulary}, r], r from 1"
            )
