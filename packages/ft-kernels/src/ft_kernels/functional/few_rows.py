"""What answering is made of: products and attention of few rows, one new token for each sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ft_kernels import tuning
from ft_kernels.dispatch import interpreting, use_triton
from ft_kernels.functional.lora_weights import NF4Weight
from ft_kernels.functional.quantization import nf4_dequantize
from ft_kernels.ops.decode_attention import reference as attention_reference
from ft_kernels.ops.decode_attention.autograd import decode_attention_op, rope_append_op
from ft_kernels.ops.nf4_linear import reference as linear_reference
from ft_kernels.ops.nf4_linear.autograd import MOST_PARTS, nf4_linear_op
from ft_kernels.ops.refusals import refuse_gradients
from ft_kernels.ops.row_linear.autograd import row_linear_op

__all__ = ["decode_attention", "gather_rows", "nf4_linear", "rope_append", "row_linear"]

MOST_ROWS = 128
"""Rows up to which a weight is expanded on the way to the product; above, it pays to do so in memory first."""
HALVES = (torch.float16, torch.bfloat16)


def nf4_linear(x: Tensor, weight: NF4Weight | Sequence[NF4Weight]) -> Tensor:
    """The product of rows with frozen NF4 weights that have one input, ``x @ cat(W_1, W_2, …).T``.

    Few rows (at most 128) in 16 bits are multiplied by a kernel that reads the weights once, in 4 bits, and writes
    nothing of them: as long as that takes is what a product of few rows takes. Otherwise each weight is expanded, in
    x's dtype, and multiplied. NF4: QLoRA, section 3 (Dettmers et al. 2023, arXiv:2305.14314). No gradients.

    Args:
        x: ``[..., K]``, fp16, bf16 or fp32, any strides.
        weight: one ``[N, K]``, or several such.

    Returns:
        ``[..., N]``, or ``[..., N_1 + N_2 + …]``, in x's dtype; added up in fp32.

    Raises:
        TypeError: x is not fp16, bf16 or fp32.
        ValueError: there is no weight, or one that has not x's K; tensors are on several devices, or x requires a
            gradient.
    """
    name = "nf4_linear"
    weights = [weight] if isinstance(weight, NF4Weight) else list(weight)
    if x.dtype not in (*HALVES, torch.float32):
        raise TypeError(f"{name}: x has dtype {x.dtype}; allowed are torch.float16, torch.bfloat16 and torch.float32")
    k = x.shape[-1] if x.dim() else 0
    if not weights:
        raise ValueError(f"{name}: there is no weight; give one or more")
    for one in weights:
        if one.shape[1] != k:
            raise ValueError(f"{name}: x has shape {list(x.shape)}, a weight {list(one.shape)}; K must be the same")
        for tensor in one.tensors:
            if tensor.device != x.device:
                raise ValueError(f"{name}: a weight is on {tensor.device}, x on {x.device}; use one device")
    refuse_gradients(name, x)
    rows = x.detach().reshape(-1, k)
    if _few(rows, weights):
        tensors = [tensor for one in weights for tensor in _tensors(one)]
        groups = 0 if weights[0].nested is None else weights[0].nested.blocksize
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        y: Tensor = nf4_linear_op(rows, tensors, [one.shape[0] for one in weights], weights[0].blocksize, groups)
    else:
        expanded = [
            nf4_dequantize(one.packed, one.absmax, one.shape, x.dtype, one.blocksize, nested=one.nested)
            for one in weights
        ]
        y = linear_reference.product(rows, expanded)
    return y.view(*x.shape[:-1], y.shape[-1])


def row_linear(x: Tensor, weight: Tensor | Sequence[Tensor]) -> Tensor:
    """The product of a row with frozen weights that have one input, ``x @ cat(W_1, W_2, …).T``.

    One row in 16 bits is multiplied by a kernel, up to three weights in one launch: it takes as long as the weights
    take to be read. More rows, or weights, are torch's products. No gradients.

    Args:
        x: ``[..., K]``, floating point, any strides.
        weight: one ``[N, K]`` in x's dtype, or several such, the last dimension contiguous.

    Returns:
        ``[..., N]``, or ``[..., N_1 + N_2 + …]``, in x's dtype; of one row added up in fp32.

    Raises:
        TypeError: dtypes differ.
        ValueError: there is no weight, or one that has not x's K; tensors are on several devices, or one requires a
            gradient.
    """
    name = "row_linear"
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    k = x.shape[-1] if x.dim() else 0
    if not weights:
        raise ValueError(f"{name}: there is no weight; give one or more")
    for one in weights:
        if one.dtype != x.dtype:
            raise TypeError(f"{name}: x has dtype {x.dtype}, a weight {one.dtype}; use one")
        if one.dim() != 2 or one.shape[1] != k:
            raise ValueError(f"{name}: x has shape {list(x.shape)}, a weight {list(one.shape)}; K must be the same")
        if one.device != x.device:
            raise ValueError(f"{name}: a weight is on {one.device}, x on {x.device}; use one device")
    refuse_gradients(name, x, *weights)
    rows = x.detach().reshape(-1, k)
    weights = [one.detach() for one in weights]
    fits = all(one.stride(1) == 1 and one.shape[0] for one in weights) and 0 < len(weights) <= MOST_PARTS and k > 1
    if rows.shape[0] == 1 and fits and x.dtype in HALVES and use_triton(x):
        y: Tensor = row_linear_op(rows.contiguous(), weights)
    else:
        y = linear_reference.product(rows, weights)
    return y.view(*x.shape[:-1], y.shape[-1])


def _few(x: Tensor, weights: Sequence[NF4Weight]) -> bool:
    """Whether the kernel computes it."""
    first = weights[0]
    alike = {(one.blocksize, None if one.nested is None else one.nested.blocksize) for one in weights}
    return (
        0 < x.shape[0] <= MOST_ROWS
        and len(weights) <= MOST_PARTS
        and len(alike) == 1
        and first.blocksize in (32, 64, 128)
        and x.shape[1] % first.blocksize == 0
        and all(one.packed.data_ptr() % 16 == 0 and one.packed.is_contiguous() and one.shape[0] for one in weights)
        and all(one.shape[0] * one.shape[1] < 2**33 for one in weights)  # words are counted in 32 bits
        and x.dtype in HALVES
        and use_triton(x)
        and (interpreting() or torch.version.hip is not None or tuning.capability(x.device) >= (8, 0))
    )


def _tensors(weight: NF4Weight) -> tuple[Tensor, ...]:
    packed, absmax = weight.packed.view(-1).view(torch.uint8), weight.absmax.contiguous()
    if weight.nested is None:
        return packed, absmax, absmax, absmax, absmax
    nested = weight.nested
    return packed, absmax, nested.absmax.contiguous(), nested.code.contiguous(), nested.offset


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one new token of each sequence over the keys and values that are kept of it.

    The query of row b sees the first ``lengths[b]`` of the kept tokens, or, with a window, the last ``window`` of
    these. The lengths stay on their device: nothing waits for it, and a recorded graph can be replayed as they grow.

        ``out_b = Σ_j softmax_j(scale · q_b·k_bj) · v_bj``

    Vaswani et al. 2017, section 3.2 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023 (arXiv:2305.13245); a
    sequence in parts, whose sums are put together: Flash-Decoding (Dao et al. 2023). No gradients.

    Args:
        q: ``[B, H, D]``, fp16, bf16, fp32 or float64, the last dimension contiguous.
        keys, values: ``[B, S, G, D]`` in q's dtype, the last dimension contiguous, G a divisor of H; query head h reads
            head ``h // (H / G)``.
        lengths: ``[B]``, int32, from 0 to S: how many tokens are kept, the new one's key and value included. A row of
            length 0 gives zeros.
        window: how many tokens a token sees, itself included; None for all.
        scale: multiplies the products; None is ``1 / sqrt(D)``.

    Returns:
        ``[B, H, D]`` in q's dtype, contiguous.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: shapes, devices or settings do not fit, or a tensor requires a gradient.
    """
    _check_attention(q, keys, values, lengths, window)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    able = interpreting() or torch.version.hip is not None or tuning.capability(q.device) >= (8, 0)
    if q.dtype in HALVES and q.shape[-1] <= 256 and q.numel() and use_triton(q) and able:
        out: Tensor = decode_attention_op(q, keys, values, lengths, window or 0, factor)
        return out
    return attention_reference.attention(q, keys, values, lengths, window, factor)


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Turn the query and key of one new token of each sequence by its position, and keep its key and value there.

    The rotation is :func:`ft_kernels.rope`'s, of all dimensions, dimension i paired with ``i + D / 2``. No gradients.

    Args:
        q: ``[B, H, D]``, floating point, the last dimension contiguous.
        k, v: ``[B, G, D]`` in q's dtype, the last dimension contiguous.
        keys, values: ``[B, S, G, D]``, written at ``[b, positions[b]]``; the last dimension contiguous.
        positions: ``[B]``, int32, from 0 to S - 1. A kernel writes nothing for any other.
        cos, sin: ``[P, D]``, a row of angles for each position, whose first half is read.

    Returns:
        The turned queries ``[B, H, D]``, contiguous.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: shapes or devices do not fit, or a tensor requires a gradient.
    """
    name = "rope_append"
    if not q.is_floating_point() or any(t.dtype != q.dtype for t in (k, v, keys, values)):
        raise TypeError(f"{name}: q, k, v, keys and values are not of one floating-point dtype")
    if positions.dtype != torch.int32 or not (cos.is_floating_point() and sin.dtype == cos.dtype):
        raise TypeError(
            f"{name}: positions are {positions.dtype}, expected torch.int32; cos {cos.dtype}, sin {sin.dtype}"
        )
    b, _, d = q.shape if q.dim() == 3 else (0, 0, 0)
    kept = (b, keys.shape[1], k.shape[1], d) if keys.dim() == 4 and k.dim() == 3 else None
    if d % 2 or k.shape != v.shape or k.shape[0] != b or keys.shape != kept or values.shape != kept:
        raise ValueError(
            f"{name}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, keys {list(keys.shape)} and values "
            f"{list(values.shape)} do not fit; they are [B, H, D], [B, G, D] twice and [B, S, G, D] twice, D even"
        )
    if positions.shape != (b,) or cos.dim() != 2 or cos.shape[1] != d or sin.shape != cos.shape:
        raise ValueError(
            f"{name}: positions {list(positions.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} do not fit; "
            f"q {list(q.shape)} needs [{b}], [P, {d}] and the same"
        )
    if any(t.stride(-1) != 1 for t in (q, k, v, keys, values, cos, sin)):
        raise ValueError(f"{name}: the last dimension of all but the positions must be contiguous")
    if any(t.device != q.device for t in (k, v, keys, values, positions, cos, sin)):
        raise ValueError(f"{name}: tensors are on several devices; use one")
    refuse_gradients(name, q, k, v, keys, values, cos, sin)
    if q.dtype in HALVES and q.numel() and use_triton(q, cos):
        turned: Tensor = rope_append_op(q, k, v, keys, values, positions, cos, sin)
        return turned
    return attention_reference.append(q, k, v, keys, values, positions, cos, sin)


def _check_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int | None) -> None:
    name = "decode_attention"
    if not q.is_floating_point() or keys.dtype != q.dtype or values.dtype != q.dtype:
        raise TypeError(f"{name}: q, keys and values have dtypes {q.dtype}, {keys.dtype} and {values.dtype}; use one")
    if lengths.dtype != torch.int32:
        raise TypeError(f"{name}: lengths have dtype {lengths.dtype}, expected torch.int32")
    fits = q.dim() == 3 and keys.dim() == 4 and keys.shape == values.shape and keys.shape[0] == q.shape[0]
    if not fits or keys.shape[3] != q.shape[2] or keys.shape[2] == 0 or q.shape[1] % keys.shape[2]:
        raise ValueError(
            f"{name}: q {list(q.shape)}, keys {list(keys.shape)} and values {list(values.shape)} do not fit; they are "
            "[B, H, D], [B, S, G, D] and the same, G a divisor of H"
        )
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"{name}: lengths have shape {list(lengths.shape)}; q needs [{q.shape[0]}]")
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in (q, keys, values)):
        raise ValueError(f"{name}: the last dimension of q, keys and values must be contiguous")
    if any(t.device != q.device for t in (keys, values, lengths)):
        raise ValueError(f"{name}: q, keys, values and lengths are on several devices; use one")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window={window}; a window is 1 or more, or None")
    refuse_gradients(name, q, keys, values)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table that may lie in the host's pinned memory, where the index is on a GPU: no more than they travel.

    Args:
        table: ``[N, W]``, on the index's device, or in the host's memory. index: int32 or int64 ``[M]``.

    Returns:
        ``[M, W]`` in the table's dtype, on the index's device; without a graph.

    A table in memory that is not pinned, or on a device without Triton, is read by the host, which waits for the index.
    """
    reaches = table.device == index.device or (index.is_cuda and table.is_pinned())
    if reaches and use_triton(table.new_empty(0, device=index.device)):
        from ft_kernels.ops.shared_rows import kernels

        return kernels.gather_rows(table.detach(), index)
    return table.detach()[index.to(table.device)].to(index.device)
