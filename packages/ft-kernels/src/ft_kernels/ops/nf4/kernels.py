"""NF4 in Triton, bit for bit what bitsandbytes' CUDA kernels give.

Those compute in fp32, flush numbers under 2⁻¹²⁶ to zero, and round once at the end. A double-quantized scale is
code2[q]·absmax2 + offset, the product rounded before the sum: a fused multiply-add would be another number. On NVIDIA's
cards the product is therefore one instruction that says so; elsewhere (the interpreter, AMD) flushing is spelt out.

Dequantizing, a thread takes eight values, which are one 32-bit word to load and, in 16 bits, 16 bytes to store; what
the sixteen numbers stand for is looked up in shared memory. Rows whose length is no multiple of eight, words that are
not aligned and outputs with two row strides are left to a plainer kernel, one value at a time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ft_kernels import dispatch, tuning
from ft_kernels.dispatch import Rows, cdiv, launch, native, power_of_2
from ft_kernels.ops.nf4.format import NESTED_BLOCKSIZE, dynamic_code

__all__ = ["dequantize", "quantiles", "quantize", "rounded", "times"]

WORDS = 1024
"""Words of eight values that a program of the fast kernel works on."""
PLAIN_BLOCK = 1024


@triton.jit
def _flush(x):
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)


@triton.jit
def times(a, b, NATIVE: tl.constexpr):
    """The product of two fp32 numbers, rounded, with numbers under 2⁻¹²⁶ as zero."""
    if NATIVE:
        product = tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = _flush(_flush(a) * _flush(b))
    return product


@triton.jit
def rounded(x, target: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 to the target dtype, to nearest; triton's interpreter would cut bf16 off."""
    if NATIVE or target != tl.bfloat16:
        result = x.to(target)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FFF0000)
        result = ((bits >> 16) & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return result


@triton.jit
def quantiles():
    """What the sixteen numbers stand for: format.CODE."""
    i = tl.arange(0, 16)
    code = tl.where(i == 0, -1.0, 0.0)
    code = tl.where(i == 1, -0.6961928009986877, code)
    code = tl.where(i == 2, -0.5250730514526367, code)
    code = tl.where(i == 3, -0.39491748809814453, code)
    code = tl.where(i == 4, -0.28444138169288635, code)
    code = tl.where(i == 5, -0.18477343022823334, code)
    code = tl.where(i == 6, -0.09105003625154495, code)
    code = tl.where(i == 8, 0.07958029955625534, code)
    code = tl.where(i == 9, 0.16093020141124725, code)
    code = tl.where(i == 10, 0.24611230194568634, code)
    code = tl.where(i == 11, 0.33791524171829224, code)
    code = tl.where(i == 12, 0.44070982933044434, code)
    code = tl.where(i == 13, 0.5626170039176941, code)
    code = tl.where(i == 14, 0.7229568362236023, code)
    return tl.where(i == 15, 1.0, code)


@triton.jit
def _scale(absmax, absmax2, code2, offset, block, mask, NESTED: tl.constexpr, NATIVE: tl.constexpr):
    """The fp32 scale of a block; 2 to the NESTED blocks share a scale of scales; negative without."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED >= 0:
        first = tl.load(code2 + scale.to(tl.int32))
        second = tl.load(absmax2 + (block >> NESTED), mask=mask, other=0.0)
        scale = times(first, second, NATIVE) + tl.load(offset)
    return scale


@triton.jit
def _dequantize_words(
    words, absmax, absmax2, code2, offset, out, out_stride, N, ROW_WORDS,
    BLOCK_BITS: tl.constexpr, NESTED: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows by WIDTH words, in a line; a block of values is 2 to the BLOCK_BITS words."""
    across = tl.cdiv(ROW_WORDS, WIDTH)
    first_row = (tl.program_id(0) // across) * ROWS
    first_word = (tl.program_id(0) % across) * WIDTH
    # The hint keeps a thread from loading several words in a row: it would store their values far apart.
    line = tl.max_contiguous(tl.arange(0, ROWS * WIDTH), 1)
    row = line // WIDTH
    col = tl.max_contiguous(first_word + line % WIDTH, 1)
    mask = (first_row + row < N) & (col < ROW_WORDS)
    i = first_row * ROW_WORDS + row * ROW_WORDS + col
    word = tl.load(words + i, mask=mask, other=0)
    scale = _scale(absmax, absmax2, code2, offset, i >> BLOCK_BITS, mask, NESTED, NATIVE)
    shift = (tl.arange(0, 8) * 4) ^ 4  # of a byte the high half comes first
    numbers = tl.reshape((word[:, None] >> shift[None, :]) & 15, [ROWS * WIDTH * 8])
    scales = tl.reshape(tl.broadcast_to(scale[:, None], [ROWS * WIDTH, 8]), [ROWS * WIDTH * 8])
    values = times(tl.gather(quantiles(), numbers, 0), scales, NATIVE)
    line = tl.arange(0, ROWS * WIDTH * 8)
    row = line // (WIDTH * 8)
    col = first_word * 8 + line % (WIDTH * 8)
    place = out + tl.cast(first_row, tl.int64) * out_stride + row * out_stride + col
    mask = (first_row + row < N) & (col < ROW_WORDS * 8)
    tl.store(place, rounded(values, out.dtype.element_ty, NATIVE), mask=mask)


@triton.jit
def _dequantize_values(
    packed, absmax, absmax2, code2, offset, out, inner, outer_stride, inner_stride, COUNT, WIDTH,
    BLOCK_BITS: tl.constexpr, NESTED: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < COUNT
    byte = tl.load(packed + i // 2, mask=mask, other=0).to(tl.int32)
    number = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    scale = _scale(absmax, absmax2, code2, offset, i >> BLOCK_BITS, mask, NESTED, NATIVE)
    value = times(tl.gather(quantiles(), number, 0), scale, NATIVE)
    row = i // WIDTH
    place = out + (row // inner) * outer_stride + (row % inner) * inner_stride + i % WIDTH
    tl.store(place, rounded(value, out.dtype.element_ty, NATIVE), mask=mask)


@cache
def _tiling(row_words: int, words: int = WORDS) -> dict[str, Any]:
    """Words across and rows down, for which least of the last tile of a row is idle."""
    widths = [w for w in (1024, 512, 256, 128) if w <= words] or [words]
    width = min(widths, key=lambda w: (cdiv(row_words, w) * w, -w))
    width = min(width, power_of_2(row_words))
    return {"WIDTH": width, "ROWS": words // width, "num_warps": max(1, words // 128)}


@cache
def _candidates(row_words: int) -> list[dict[str, Any]]:
    return [_tiling(row_words, words) | {"num_warps": w} for words in (512, 1024, 2048) for w in (4, 8, 16)]


def _rows_of_words(packed: Tensor, out: Tensor, rows: Rows) -> tuple[int, int, int] | None:
    """How many rows, their stride and their words, if the fast kernel can do it."""
    inner, _, stride = rows.layout
    width = out.shape[-1]
    if inner != rows.count or width % 8 or packed.storage_offset() % 4 or packed.data_ptr() % 4:
        return None
    if out.numel() >= 2**33 or stride > 2**20:
        return None  # words, and values of a few rows, are counted in 32 bits
    if (rows.count == 1 or stride == width) and out.numel() < 2**30:
        return 1, out.numel(), out.numel() // 8  # one long row
    return rows.count, stride, width // 8


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out: Tensor,
) -> Tensor:
    """The values, written to ``out``.

    Args:
        packed: ``[(out.numel() + 1) // 2]``, uint8, contiguous.
        absmax: the scale of each block of ``blocksize`` values, fp32; or its 8-bit number.
        absmax2, code2, offset: of 8-bit numbers, the scale of each ``nested_blocksize`` of them, what the numbers stand
            for, and what is added, fp32; or None.
        out: fp32, fp16 or bf16, of any strides; a row of any length.
    """
    if out.numel() == 0:
        return out
    rows = Rows(out)
    if rows.tensor is not out:
        rows = Rows(dispatch.allocate(out.shape, out.dtype, out.device))
    nested = absmax2 is not None
    tables = [absmax, absmax if absmax2 is None else absmax2, code2 if nested else absmax, offset if nested else absmax]
    constants = {"NESTED": nested_blocksize.bit_length() - 1 if nested else -1, "NATIVE": native()}
    words = _rows_of_words(packed, rows.tensor, rows)
    if words is not None:
        count, stride, row_words = words
        settings = tuning.settings(
            "nf4_dequantize", out.device, (row_words, blocksize, out.dtype),
            default=_tiling(row_words), candidates=_candidates(row_words),
        )  # fmt: skip
        grid = (cdiv(count, settings["ROWS"]) * cdiv(row_words, settings["WIDTH"]),)
        launch(
            "nf4_dequantize", _dequantize_words, grid, out.device,
            packed.view(torch.int32), *tables, rows.tensor, stride, count, row_words,
            BLOCK_BITS=blocksize.bit_length() - 4, **constants, **settings,
        )  # fmt: skip
    else:
        launch(
            "nf4_dequantize_values", _dequantize_values, (cdiv(out.numel(), PLAIN_BLOCK),), out.device,
            packed, *tables, rows.tensor, *rows.layout, out.numel(), out.shape[-1],
            BLOCK_BITS=blocksize.bit_length() - 1, **constants, BLOCK=PLAIN_BLOCK, num_warps=4,
        )  # fmt: skip
    if rows.tensor is not out:
        out.copy_(rows.tensor)
    return out


@triton.jit
def _fractions(x, NATIVE: tl.constexpr):
    """x ``[blocks, values]`` as fractions of each block's largest magnitude (nan where that is 0), and the magnitudes.

    nan does not count as a magnitude; a block of nothing else has the lowest finite number.
    """
    values = _flush(x.to(tl.float32))
    absmax = tl.max(tl.where(values == values, tl.abs(values), -3.4028234663852886e38), 1)
    if NATIVE:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [absmax], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = _flush(1.0 / absmax)
    return times(values, inverse[:, None], NATIVE), absmax


@triton.jit
def _number(f, NATIVE: tl.constexpr):
    """How many of format.THRESHOLDS f is greater than, by halves; 0 for nan. Off the GPU, those rounded up."""
    t0: tl.constexpr = -0.8480964303016663 if NATIVE else -0.8480963706970215
    t8: tl.constexpr = 0.1202552542090416 if NATIVE else 0.120255246758461
    t12: tl.constexpr = 0.5016633868217468 if NATIVE else 0.5016634464263916
    t14: tl.constexpr = 0.8614783883094788 if NATIVE else 0.8614784479141235
    a = f > 0.03979014977812767
    b = f > tl.where(a, 0.3893125355243683, -0.33967941999435425)
    if_b = tl.where(a, 0.6427869200706482, -0.13791173696517944)
    c = f > tl.where(b, if_b, tl.where(a, 0.2035212516784668, -0.6106328964233398))
    if_bc = tl.where(a, t14, -0.045525018125772476)
    if_b = tl.where(a, t12, -0.23460739850997925)
    if_c = tl.where(a, 0.2920137643814087, -0.4599952697753906)
    neither = tl.where(a, t8, t0)
    d = f > tl.where(b, tl.where(c, if_bc, if_b), tl.where(c, if_c, neither))
    return a.to(tl.int32) * 8 + b.to(tl.int32) * 4 + c.to(tl.int32) * 2 + d.to(tl.int32)


@triton.jit
def _quantize(x, packed, absmax, COUNT, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    fractions, largest = _fractions(tl.load(x + i, mask=i < COUNT, other=0.0), NATIVE)
    tl.store(absmax + block, largest, mask=block * BLOCKSIZE < COUNT)
    first, second = tl.split(tl.reshape(_number(fractions, NATIVE), [BLOCKS, BLOCKSIZE // 2, 2]))
    pair = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + pair, (first * 16 + second).to(tl.uint8), mask=pair * 2 < COUNT)


@triton.jit
def _quantize8(x, code, numbers, absmax, COUNT, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    """8-bit numbers of the nearest codes, searched by halves: where that ends decides between two equally near ones."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    f, largest = _fractions(tl.load(x + i, mask=i < COUNT, other=0.0), NATIVE)
    tl.store(absmax + block, largest, mask=block * BLOCKSIZE < COUNT)
    here = tl.full(f.shape, 127, tl.int32)
    below = tl.full(f.shape, 0, tl.int32)
    above = tl.full(f.shape, 255, tl.int32)
    for half in tl.static_range(7):
        right = f > tl.load(code + here)
        below = tl.where(right, here, below)
        above = tl.where(right, above, here)
        here = here + tl.where(right, 64 >> half, -(64 >> half))
    value = tl.load(code + here)
    right = f > value
    beyond = tl.where(right, above, below)
    middle = (tl.load(code + beyond) + value) * 0.5
    nearer = tl.where(right, f > middle, f < middle)
    tl.store(numbers + i, tl.where(nearer, beyond, here).to(tl.uint8), mask=i < COUNT)


def quantize(x: Tensor, blocksize: int, nested: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Bytes, scales (fp32, or 8-bit numbers), and for these their scales, code and offset; else three empty tensors."""
    device, count = x.device, x.numel()
    blocks = cdiv(count, blocksize)
    packed = dispatch.allocate(((count + 1) // 2,), torch.uint8, device)
    absmax = dispatch.allocate((blocks,), torch.float32, device)
    if count:
        per_program = max(1, 4096 // blocksize)
        launch(
            "nf4_quantize", _quantize, (cdiv(blocks, per_program),), device,
            x.contiguous(), packed, absmax, count,
            BLOCKSIZE=blocksize, BLOCKS=per_program, NATIVE=native(), num_warps=8,
        )  # fmt: skip
    if not nested:
        nothing = [absmax.new_empty(0) for _ in range(3)]
        return packed, absmax, nothing[0], nothing[1], nothing[2]
    # The mean and the difference by torch, as bitsandbytes has them: the order of a sum decides its last digits.
    offset = absmax.mean()
    code2 = dynamic_code(device).clone()
    numbers = dispatch.allocate((blocks,), torch.uint8, device)
    groups = cdiv(blocks, NESTED_BLOCKSIZE)
    absmax2 = dispatch.allocate((groups,), torch.float32, device)
    if count:
        launch(
            "nf4_quantize_scales", _quantize8, (cdiv(groups, 4),), device,
            absmax - offset, code2, numbers, absmax2, blocks,
            BLOCKSIZE=NESTED_BLOCKSIZE, BLOCKS=4, NATIVE=native(), num_warps=8,
        )  # fmt: skip
    return packed, numbers, absmax2, code2, offset
