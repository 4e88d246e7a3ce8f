"""Packed attention as registered torch operations: by our kernel, and by torch's own kernels where they know documents.

torch's kernels have no sinks. Their backward passes compute the weights again from the logarithm of each row's sum of
exponentials (lse) and take D = Σ dO·O from the output, so it is enough to give them the lse that counts the sink and
the output that belongs to it: the gradients of q, k and v are then exact; that of the sink is −Σ exp(sink − lse)·D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["by_torch", "by_torch_backward", "torch_op", "triton_op"]


def _no_sinks(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


@torch.library.custom_op(
    "ft_kernels::packed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor intervals, Tensor? sinks, float scale, float softcap, "
    "bool exact=False) -> (Tensor, Tensor)",
)
def triton_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output ``[T, H, D]`` and the lse ``[H, T]``, by the kernel. A softcap of 0 is none."""
    from ft_kernels.ops.packed_attention import kernels

    return kernels.forward(q, k, v, intervals, sinks, scale, softcap)


@triton_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "ft_kernels::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor intervals, Tensor? sinks, Tensor out, Tensor lse, "
    "float scale, float softcap, bool exact=False) -> (Tensor, Tensor, Tensor, Tensor)",
)
def triton_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks, by the kernels."""
    from ft_kernels.ops.packed_attention import kernels

    return kernels.backward(grad, q, k, v, intervals, sinks, out, lse, scale, softcap, exact)


@triton_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = _no_sinks(q) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _triton_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, intervals, sinks, *settings = inputs
    ctx.save_for_backward(q, k, v, intervals, sinks, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.settings = settings


def _triton_backward(ctx: Any, grad: Tensor | None, _: Tensor) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    sinks = ctx.saved_tensors[4]
    dq, dk, dv, dsinks = triton_backward_op(grad, *ctx.saved_tensors, *ctx.settings)
    return dq, dk, dv, None, None if sinks is None else dsinks, None, None, None


triton_op.register_autograd(_triton_backward, setup_context=_triton_context)


def _batched(x: Tensor, length: int) -> Tensor:
    """``[B, H, L, D]`` of a row of documents of one length, a view where x's rows allow."""
    batch: Tensor = x.unflatten(0, (-1, length))
    return batch.transpose(1, 2)


def _row(x: Tensor) -> Tensor:
    """``[T, H, D]``, contiguous, of ``[B, H, L, D]``; no copy where that is laid out as :func:`_batched` gives it."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    kind: str,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output ``[T, H, D]`` and the lse, by one of torch's kernels.

    Args:
        kind: "flash" (FlashAttention-2, any documents) or "dense" (cuDNN over a batch; every document has max_length
            tokens).
        window: 0 for none; "flash" only.
    """
    aten: Any = torch.ops.aten
    if kind == "dense":
        q4, k4, v4 = (_batched(x, max_length) for x in (q, k, v))
        result = aten._scaled_dot_product_cudnn_attention(q4, k4, v4, None, True, 0.0, causal, False, scale=scale)
        out, lse = result[0], result[1]  # [B, H, L, D], [B, H, L, 1]
        if sinks is not None:
            with_sink = torch.logaddexp(lse, sinks.float()[:, None, None])
            out, lse = out.mul_((lse - with_sink).exp_()), with_sink
        return _row(out), lse
    result = aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, 0.0, causal, False, scale=scale,
        **_window_sizes(causal, window),
    )  # fmt: skip
    out, lse = result[0], result[1]  # [T, H, D], [H, T]
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.float()[:, None])
        out, lse = out.mul_((lse - with_sink).exp_().T[..., None]), with_sink
    return out.contiguous(), lse


torch_op = torch.library.custom_op(
    "ft_kernels::packed_attention_by_torch",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? sinks, str kind, int max_length, bool causal, "
    "int window, float scale) -> (Tensor, Tensor)",
)(by_torch)


def _window_sizes(causal: bool, window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _lse_shape(q: Tensor, kind: str, max_length: int) -> tuple[int, ...]:
    total, heads, _ = q.shape
    return (total // max_length, heads, max_length, 1) if kind == "dense" else (heads, total)


@torch_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    kind: str,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q, kind, max_length), dtype=torch.float32)


def by_torch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kind: str,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the sinks, by the same kernels."""
    aten: Any = torch.ops.aten
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the state of dropout, of which there is none
    grad = grad.contiguous()
    if kind == "dense":
        tensors = [_batched(x, max_length) for x in (grad, q, k, v, out)]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse, unused, unused, None, None, None, max_length, max_length, 0.0, causal, scale=scale
        )
        grads = [_row(x) for x in grads]
        flat = lse.squeeze(-1).transpose(0, 1).flatten(1)
    else:
        where = (cu_seqlens, cu_seqlens, max_length, max_length, 0.0, causal)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            grad, q, k, v, out, lse, *where, state, unused, scale=scale, **_window_sizes(causal, window)
        )
        grads = [x.contiguous() for x in grads]
        flat = lse
    if sinks is None:
        return grads[0], grads[1], grads[2], _no_sinks(q)
    from ft_kernels.ops.packed_attention.kernels import delta

    share = (sinks.float()[:, None] - flat).exp_().mul_(delta(grad, out))
    return grads[0], grads[1], grads[2], -share.sum(1).to(sinks.dtype)


torch_backward_op = torch.library.custom_op(
    "ft_kernels::packed_attention_by_torch_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? sinks, Tensor out, Tensor lse, "
    "str kind, int max_length, bool causal, int window, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)(by_torch_backward)


@torch_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kind: str,
    max_length: int,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = _no_sinks(q) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _torch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, sinks, *settings = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, sinks, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what has no gradient would be made, and read by nobody
    ctx.settings = settings


def _torch_backward(ctx: Any, grad: Tensor | None, _: Tensor) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    sinks = ctx.saved_tensors[4]
    dq, dk, dv, dsinks = torch_backward_op(grad, *ctx.saved_tensors, *ctx.settings)
    return dq, dk, dv, None, None if sinks is None else dsinks, None, None, None, None, None


torch_op.register_autograd(_torch_backward, setup_context=_torch_context)
