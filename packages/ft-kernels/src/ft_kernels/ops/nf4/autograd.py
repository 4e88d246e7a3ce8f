"""NF4 as registered torch operations, so that ``torch.compile`` goes through the kernels. There are no gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.ops.nf4.format import NESTED_BLOCKSIZE

__all__ = ["nf4_dequantize_op", "nf4_dequantize_out_op", "nf4_quantize_op"]

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? code2, Tensor? offset"


@torch.library.custom_op(
    "ft_kernels::nf4_dequantize",
    mutates_args=(),
    schema=f"({_WEIGHT}, SymInt[] shape, ScalarType dtype, int blocksize, int nested_blocksize) -> Tensor",
)
def nf4_dequantize_op(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """The values in a new tensor, by the kernel."""
    from ft_kernels.ops.nf4 import kernels

    out = dispatch.allocate(shape, dtype, packed.device)
    return kernels.dequantize(packed, absmax, absmax2, code2, offset, blocksize, nested_blocksize, out)


@nf4_dequantize_op.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op(
    "ft_kernels::nf4_dequantize_out",
    mutates_args={"out"},
    schema=f"({_WEIGHT}, int blocksize, int nested_blocksize, Tensor(a!) out) -> ()",
)
def nf4_dequantize_out_op(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> None:
    """The values written to ``out``, of any strides, by the kernel."""
    from ft_kernels.ops.nf4 import kernels

    kernels.dequantize(packed, absmax, absmax2, code2, offset, blocksize, nested_blocksize, out)


@nf4_dequantize_out_op.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> None:
    return None


@torch.library.custom_op(
    "ft_kernels::nf4_quantize",
    mutates_args=(),
    schema="(Tensor x, int blocksize, bool nested) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def nf4_quantize_op(x: Tensor, blocksize: int, nested: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bytes, scales, and the scales', code and offset of double-quantized ones (else empty), by the kernel."""
    from ft_kernels.ops.nf4 import kernels

    return kernels.quantize(x, blocksize, nested)


@nf4_quantize_op.register_fake
def _(x: Tensor, blocksize: int, nested: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks = (x.numel() + blocksize - 1) // blocksize
    packed = x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8)
    if not nested:
        empty = [x.new_empty(0, dtype=torch.float32) for _ in range(3)]
        return packed, x.new_empty(blocks, dtype=torch.float32), empty[0], empty[1], empty[2]
    groups = (blocks + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    return (
        packed,
        x.new_empty(blocks, dtype=torch.uint8),
        x.new_empty(groups, dtype=torch.float32),
        x.new_empty(256, dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )
