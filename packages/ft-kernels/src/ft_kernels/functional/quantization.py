"""Weights and activations in 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ft_kernels.dispatch import KERNEL_DTYPES, use_triton
from ft_kernels.ops.fp8 import reference as fp8_reference
from ft_kernels.ops.fp8.autograd import fp8_quantize_op
from ft_kernels.ops.int8 import reference as int8_reference
from ft_kernels.ops.int8.autograd import int8_dequantize_op, int8_dequantize_out_op
from ft_kernels.ops.nf4 import reference as nf4_reference
from ft_kernels.ops.nf4.autograd import nf4_dequantize_op, nf4_dequantize_out_op, nf4_quantize_op
from ft_kernels.ops.nf4.format import BLOCKSIZES, NESTED_BLOCKSIZE

__all__ = [
    "Fp8Scaling",
    "NestedScales",
    "check_int8",
    "check_nf4",
    "fp8_quantize",
    "int8_dequantize",
    "nf4_dequantize",
    "nf4_quantize",
]

Fp8Scaling = Literal["row", "1x128", "128x128"]


@dataclass(frozen=True)
class NestedScales:
    """What turns double-quantized scales back into numbers: ``code[q[i]] · absmax[i // blocksize] + offset``.

    Of bitsandbytes' ``QuantState``, these are ``state2.absmax``, ``state2.code``, ``offset`` and ``state2.blocksize``.

    Attributes:
        absmax: ``[ceil(blocks / blocksize)]``, fp32, the scales of the scales.
        code: ``[256]``, fp32, what the 8-bit numbers stand for.
        offset: fp32, one element, on the same device (it is not read by the host).
        blocksize: how many scales share one.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int = NESTED_BLOCKSIZE


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int = 64,
    *,
    nested: NestedScales | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A bitsandbytes NF4 weight as numbers, bit for bit what bitsandbytes gives on a GPU.

    QLoRA, section 3 (Dettmers et al. 2023, arXiv:2305.14314). The product of code and scale is made in fp32 and rounded
    once. No gradients.

    Args:
        packed: two values a byte, the first in the high half: any shape and storage dtype (bitsandbytes'
            ``quant_storage``), as many bytes as the values need.
        absmax: ``[ceil(values / blocksize)]``, the scale of each block of values in a row, fp32; uint8 where the scales
            are quantized too.
        shape: of the weight, ``[..., K]``.
        dtype: fp32, fp16 or bf16.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        nested: what turns uint8 scales into numbers.
        out: where to write the values, of this shape and dtype and any strides: ``wider[..., :K]`` is written without a
            copy.

    Returns:
        ``shape`` in ``dtype``; ``out``, or else contiguous.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: sizes or devices do not fit, or uint8 scales come without ``nested``.
    """
    name = "nf4_dequantize"
    if not isinstance(shape, Sequence):
        raise TypeError(f"{name}: shape is {shape!r}; give the weight's sizes, (N, K)")
    shape = torch.Size(shape)
    _check_dtype(name, "dtype is", dtype)
    check_nf4(name, packed, absmax, shape, blocksize, nested)
    for what, (tensor, *_) in _tables(absmax, nested, shape.numel(), blocksize).items():
        if tensor.device != packed.device:
            raise ValueError(f"{name}: {what} is on {tensor.device}, packed on {packed.device}; use one device")
    packed = packed.contiguous().view(-1).view(torch.uint8)
    absmax = absmax.contiguous()
    absmax2, code2, offset, groups = None, None, None, NESTED_BLOCKSIZE
    if nested is not None:
        absmax2, code2, offset, groups = (
            nested.absmax.contiguous(), nested.code.contiguous(), nested.offset, nested.blocksize
        )  # fmt: skip
    if out is not None:
        _check_out(name, out, shape, dtype, packed.device)
        if use_triton(packed):
            nf4_dequantize_out_op(packed, absmax, absmax2, code2, offset, blocksize, groups, out)
            return out
    elif use_triton(packed):
        values: Tensor = nf4_dequantize_op(packed, absmax, absmax2, code2, offset, shape, dtype, blocksize, groups)
        return values
    values = nf4_reference.dequantize(packed, absmax, absmax2, code2, offset, shape, dtype, blocksize, groups)
    return values if out is None else out.copy_(values)


def nf4_quantize(
    x: Tensor, blocksize: int = 64, *, nested: bool = True, storage: torch.dtype = torch.uint8
) -> tuple[Tensor, Tensor, NestedScales | None]:
    """A weight in bitsandbytes' NF4 format, with the codes and scales that bitsandbytes gives on a GPU.

    QLoRA, section 3 (Dettmers et al. 2023, arXiv:2305.14314). Each block is divided by its largest magnitude and each
    quotient becomes the number of the nearest of sixteen quantiles of the normal distribution. A block of zeros gets
    number 0 and scale 0, as on a GPU (bitsandbytes on a CPU has number 7). On a GPU the division goes by the hardware's
    approximate reciprocal, as in bitsandbytes; elsewhere it is exact, which may give a neighbouring code for a value
    within one last place of a threshold. No gradients.

    Args:
        x: ``[..., K]``, fp32, fp16 or bf16, any strides.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096 values to a scale.
        nested: whether scales are quantized too, to 8 bits, 256 to a scale of their own.
        storage: dtype that the bytes are viewed as, bitsandbytes' ``quant_storage``.

    Returns:
        The bytes, ``[ceil(values / 2) / storage's size, 1]`` as in bitsandbytes; the scales, fp32, or uint8 if nested;
        and what turns uint8 scales into numbers, or None.

    Raises:
        TypeError: x is not fp32, fp16 or bf16.
        ValueError: a blocksize that is not allowed, or bytes that do not fill numbers of the storage dtype.
    """
    name = "nf4_quantize"
    _check_dtype(name, "x has dtype", x.dtype)
    _check_blocksize(name, blocksize)
    if ((x.numel() + 1) // 2) % storage.itemsize:
        raise ValueError(
            f"{name}: x {list(x.shape)} needs {(x.numel() + 1) // 2} bytes, which do not fill numbers of {storage}; "
            "use torch.uint8"
        )
    x = x.detach()
    results = (nf4_quantize_op if use_triton(x) else nf4_reference.quantize)(x, blocksize, nested)
    packed, absmax, absmax2, code2, offset = results
    return packed.view(storage).unsqueeze(-1), absmax, NestedScales(absmax2, code2, offset) if nested else None


def int8_dequantize(
    quantized: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, *, out: Tensor | None = None
) -> Tensor:
    """A bitsandbytes 8-bit weight as numbers, ``quantized · scales / 127``, bit for bit what bitsandbytes gives.

    LLM.int8(), section 2 (Dettmers et al. 2022, arXiv:2208.07339). As in its ``int8_vectorwise_dequant``, both products
    are made in fp32, the second one with 1/127 rounded to fp32; the result is rounded to ``dtype``. No gradients.

    Args:
        quantized: ``[..., N, K]``, int8, any strides; bitsandbytes' ``CB``.
        scales: the largest magnitude of each row, ``[..., N]`` or ``[..., N, 1]``, fp32; bitsandbytes' ``SCB``.
        dtype: fp32, fp16 or bf16.
        out: where to write the values, of quantized's shape, of ``dtype`` and any strides: ``wider[..., :K]`` is
            written without a copy.

    Returns:
        quantized's shape in ``dtype``; ``out``, or else contiguous.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: sizes or devices do not fit.
    """
    name = "int8_dequantize"
    check_int8(name, quantized, scales)
    _check_dtype(name, "dtype is", dtype)
    if scales.device != quantized.device:
        raise ValueError(f"{name}: scales are on {scales.device}, quantized on {quantized.device}; use one device")
    scales = scales.detach().reshape(quantized.shape[:-1])
    if out is None:
        if use_triton(scales):
            values: Tensor = int8_dequantize_op(quantized, scales, dtype)
            return values
        return int8_reference.dequantize(quantized, scales, dtype)
    _check_out(name, out, quantized.shape, dtype, quantized.device)
    if use_triton(scales):
        int8_dequantize_out_op(quantized, scales, out)
        return out
    return out.copy_(int8_reference.dequantize(quantized, scales, dtype))


def fp8_quantize(x: Tensor, scaling: Fp8Scaling = "row") -> tuple[Tensor, Tensor]:
    """A tensor as e4m3fn numbers and fp32 scales, ``x ≈ numbers · scales``, laid out for ``torch._scaled_mm``.

    FP8 Formats for Deep Learning (Micikevicius et al. 2022, arXiv:2209.05433); groups and blocks of 128 as in
    DeepSeek-V3, section 3.3.2 (arXiv:2412.19437). In fp32, each operation rounded:

        scale = max(largest magnitude · (1/448), 2⁻¹²⁶)        number = e4m3fn(clamp(x · (1/scale), ±448))

    where 1/448 is a constant rounded to fp32 and e4m3fn rounds to nearest, ties to even. A group of zeros has scale
    2⁻¹²⁶. One nan makes all of its group's numbers and their scale nan. An infinity makes the scale infinite, its own
    number nan and the others 0, so that the product with the scale is nan everywhere. No gradients.

    It is computed alike on every card; those before compute capability 8.9 have no fp8 instructions, and the kernel
    puts the numbers together from integers there.

        qx, sx = fp8_quantize(x)                # [M, K], [M, 1]
        qw, sw = fp8_quantize(weight)           # [N, K], [N, 1]
        y = torch._scaled_mm(qx, qw.t(), scale_a=sx, scale_b=sw.t(), out_dtype=torch.bfloat16)

    and so too with ``"1x128"`` for x and ``"128x128"`` for the weight. For the weight's other side, quantize
    ``weight.t()``: read in place with ``"128x128"``, copied with the others.

    Args:
        x: ``[..., K]``, for ``"128x128"`` ``[N, K]``; fp32, fp16 or bf16, any strides, possibly empty. Sizes need not
            be multiples of 128.
        scaling: which values share a scale: ``"row"``, ``"1x128"`` (128 in a row) or ``"128x128"``.

    Returns:
        The numbers, x's shape, contiguous, and the scales: ``[..., 1]``; or ``[..., ceil(K / 128)]``, where those of
        the same 128 columns lie side by side; or ``[ceil(N / 128), ceil(K / 128)]``, whose rows are a multiple of four
        numbers apart.

    Raises:
        TypeError: x is not fp32, fp16 or bf16.
        ValueError: a scaling of another name, or x has not the dimensions for it.
    """
    name = "fp8_quantize"
    if scaling not in fp8_reference.SCALINGS:
        raise ValueError(f"{name}: scaling={scaling!r}; allowed are {', '.join(map(repr, fp8_reference.SCALINGS))}")
    _check_dtype(name, "x has dtype", x.dtype)
    if x.dim() == 0 or (scaling == "128x128" and x.dim() != 2):
        needed = "[N, K]" if scaling == "128x128" else "[..., K]"
        raise ValueError(f"{name}: x has shape {list(x.shape)}; scaling {scaling!r} needs {needed}")
    number = fp8_reference.SCALINGS.index(scaling)
    result: tuple[Tensor, Tensor] = (fp8_quantize_op if use_triton(x) else fp8_reference.quantize)(x.detach(), number)
    return result


def check_int8(name: str, quantized: Tensor, scales: Tensor) -> None:
    """Raise if these are not a weight in 8 bits, wherever they lie."""
    if quantized.dtype != torch.int8:
        raise TypeError(f"{name}: quantized has dtype {quantized.dtype}, expected torch.int8")
    if scales.dtype != torch.float32:
        raise TypeError(f"{name}: scales have dtype {scales.dtype}, expected torch.float32")
    if quantized.dim() == 0 or scales.numel() != quantized.shape[:-1].numel():
        raise ValueError(
            f"{name}: quantized {list(quantized.shape)} and scales {list(scales.shape)} do not fit; there is one scale "
            "for each row [..., K]"
        )


def check_nf4(
    name: str, packed: Tensor, absmax: Tensor, shape: torch.Size, blocksize: int, nested: NestedScales | None
) -> None:
    """Raise if these are not a weight of this shape in NF4, wherever they lie. A kernel would read what lies behind."""
    _check_blocksize(name, blocksize)
    needed, given = (shape.numel() + 1) // 2, packed.numel() * packed.itemsize
    if given != needed:
        raise ValueError(f"{name}: packed has {given} bytes; shape {list(shape)} needs {needed}")
    if nested is not None and (nested.blocksize < 1 or nested.blocksize & (nested.blocksize - 1)):
        raise ValueError(f"{name}: nested.blocksize={nested.blocksize}; allowed are powers of two")
    for what, (tensor, dtype, numel) in _tables(absmax, nested, shape.numel(), blocksize).items():
        if tensor.dtype != dtype:
            hint = "; uint8 scales need nested" if tensor.dtype == torch.uint8 else ""
            raise TypeError(f"{name}: {what} has dtype {tensor.dtype}, expected {dtype}{hint}")
        if tensor.numel() != numel:
            raise ValueError(f"{name}: {what} has {tensor.numel()} elements, expected {numel} for shape {list(shape)}")


def _tables(
    absmax: Tensor, nested: NestedScales | None, values: int, blocksize: int
) -> dict[str, tuple[Tensor, torch.dtype, int]]:
    """What stands beside the bytes, and which dtype and how many elements it needs."""
    blocks = -(-values // blocksize)
    if nested is None:
        return {"absmax": (absmax, torch.float32, blocks)}
    return {
        "absmax": (absmax, torch.uint8, blocks),
        "nested.absmax": (nested.absmax, torch.float32, -(-blocks // nested.blocksize)),
        "nested.code": (nested.code, torch.float32, 256),
        "nested.offset": (nested.offset, torch.float32, 1),
    }


def _check_dtype(name: str, what: str, dtype: torch.dtype) -> None:
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name}: {what} {dtype}; allowed are torch.float32, torch.float16 and torch.bfloat16")


def _check_blocksize(name: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: blocksize={blocksize}; allowed are {', '.join(map(str, BLOCKSIZES))}")


def _check_out(name: str, out: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if out.shape != shape:
        raise ValueError(f"{name}: out has shape {list(out.shape)}, the result {list(shape)}; they must be the same")
    if out.dtype != dtype:
        raise TypeError(f"{name}: out has dtype {out.dtype}, the result {dtype}; use one dtype")
    if out.device != device:
        raise ValueError(f"{name}: out is on {out.device}, the input on {device}; move them to one device")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{name}: out repeats elements (expanded, stride 0); use memory of its own for each element")
