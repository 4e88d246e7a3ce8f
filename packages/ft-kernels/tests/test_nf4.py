from __future__ import annotations

import math
import mmap
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ft_kernels import dispatch
from ft_kernels.functional.quantization import NestedScales, nf4_dequantize, nf4_quantize
from ft_kernels.ops.nf4 import reference
from ft_kernels.ops.nf4.format import BLOCKSIZES, CODE, dynamic_code, thresholds

FAST, PLAIN, QUANTIZE, QUANTIZE_SCALES = (
    "nf4_dequantize", "nf4_dequantize_values", "nf4_quantize", "nf4_quantize_scales"
)  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, in the interpreter, about 1/0 that is meant


@pytest.fixture
def bnb():
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):  # on a CPU it compiles some of its functions, for a minute
        yield functional


def same_bits(a, b):
    integer = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def by_reference(packed, absmax, shape, dtype, blocksize, nested=None):
    tables = (None, None, None) if nested is None else (nested.absmax, nested.code, nested.offset)
    packed = packed.contiguous().view(-1).view(torch.uint8)
    groups = 256 if nested is None else nested.blocksize
    return reference.dequantize(packed, absmax, *tables, shape, dtype, blocksize, groups)


def weight(shape, blocksize, device, generator, nested_blocksize=None):
    """Random bytes and scales; scales over many orders of magnitude, zero and tiny ones among them."""
    count = math.prod(shape)
    packed = torch.randint(256, ((count + 1) // 2,), generator=generator).to(torch.uint8)
    blocks = -(-count // blocksize)
    absmax = torch.exp(torch.randn(blocks, generator=generator) * 4)
    absmax[::7] *= torch.tensor([0.0, 1e-44, 1e-38, 2e-37])[torch.arange(len(absmax[::7])) % 4]
    if nested_blocksize is None:
        return packed.to(device), absmax.to(device), None
    absmax = torch.randint(256, (blocks,), generator=generator).to(torch.uint8)
    groups = -(-blocks // nested_blocksize)
    nested = NestedScales(
        torch.rand(groups, generator=generator).to(device), dynamic_code(torch.device("cpu")).to(device),
        torch.rand((), generator=generator).to(device), nested_blocksize,
    )  # fmt: skip
    return packed.to(device), absmax.to(device), nested


def test_the_format_is_that_of_bitsandbytes(bnb):
    code = bnb.get_4bit_type("nf4", device="cpu")
    assert torch.equal(torch.tensor(CODE), code)
    assert torch.equal(thresholds(torch.device("cpu")), (code[1:] + code[:-1]) / 2)
    assert torch.equal(dynamic_code(torch.device("cpu")), bnb.create_dynamic_map())


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_threshold_is_that_of_bitsandbytes(bnb, device, blocksize):
    """The fp32 numbers next to each threshold, in blocks whose largest value is one."""
    at = thresholds(torch.device("cpu")).view(torch.int32)
    near = (at[:, None] + torch.arange(-4, 5, dtype=torch.int32)).view(torch.float32).flatten()
    x = torch.ones(8 * 4096)
    for i, value in enumerate(near.split(24)):
        x[4096 * i + 1 : 4096 * i + 1 + len(value)] = value
    x = x.view(2, -1).to(device)
    packed, absmax, _ = nf4_quantize(x, blocksize, nested=False)
    expected, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    assert torch.equal(packed.flatten(), expected.flatten())
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(reference.quantize(x, blocksize, False)[0].flatten(), expected.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_all_codes_are_bit_for_bit_as_in_bitsandbytes(bnb, device, launched, blocksize, dtype):
    # Rows that long because bitsandbytes' CPU code is wrong for blocks longer than a row.
    shape = (2, 8192)
    generator = torch.Generator().manual_seed(blocksize)
    packed = torch.arange(256, dtype=torch.uint8).repeat(32).to(device)
    absmax = torch.exp(torch.randn(2 * 8192 // blocksize, generator=generator)).to(device)
    if device == "cuda":
        absmax[0] = 1e-37  # its smaller products are flushed to zero, as only GPUs do
    state = bnb.QuantState(absmax, torch.Size(shape), None, blocksize, "nf4", dtype)
    expected = bnb.dequantize_4bit(packed[:, None], state)
    with launched(FAST):
        actual = nf4_dequantize(packed, absmax, shape, dtype, blocksize)
    assert same_bits(actual, expected)
    assert same_bits(by_reference(packed, absmax, shape, dtype, blocksize), expected)
    # The byte-wise kernel too: into rows with two strides.
    out = torch.zeros(2, 5, 3, 4100, dtype=dtype, device=device)[:, :2, 1, :4096]
    with launched(PLAIN):
        nf4_dequantize(packed, absmax, (2, 2, 4096), dtype, blocksize, out=out)
    assert same_bits(out.reshape(shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_double_quantized_scales_are_bit_for_bit_as_in_bitsandbytes(bnb, device, launched, blocksize, dtype):
    shape = (16, 8192)
    packed, absmax, nested = weight(shape, blocksize, device, torch.Generator().manual_seed(blocksize), 256)
    state = bnb.QuantState(
        absmax, torch.Size(shape), None, blocksize, "nf4", dtype, nested.offset,
        bnb.QuantState(nested.absmax, None, nested.code, 256, dtype=torch.float32),
    )  # fmt: skip
    expected = bnb.dequantize_4bit(packed[:, None], state)
    with launched(FAST):
        actual = nf4_dequantize(packed, absmax, shape, dtype, blocksize, nested=nested)
    assert same_bits(actual, expected)
    assert same_bits(by_reference(packed, absmax, shape, dtype, blocksize, nested), expected)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40), width=st.integers(1, 90), eight=st.booleans(), pad=st.sampled_from([0, 1, 8]),
    blocksize=st.sampled_from([32, 64, 256]), nested=st.sampled_from([None, 1, 64, 256]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(rows=3, width=1376, eight=True, pad=64, blocksize=64, nested=256, dtype=torch.bfloat16, seed=0)
@example(rows=5, width=1, eight=False, pad=0, blocksize=32, nested=None, dtype=torch.float32, seed=0)
def test_any_shape_into_a_wider_row(device, launched, rows, width, eight, pad, blocksize, nested, dtype, seed):
    width *= 8 if eight else 1
    packed, absmax, nested = weight((rows, width), blocksize, device, torch.Generator().manual_seed(seed), nested)
    wide = torch.full((rows, width + pad), math.nan, dtype=dtype, device=device)
    out = wide[:, :width]
    with launched(PLAIN if width % 8 else FAST):
        result = nf4_dequantize(packed, absmax, (rows, width), dtype, blocksize, nested=nested, out=out)
    assert result is out
    assert same_bits(result, by_reference(packed, absmax, (rows, width), dtype, blocksize, nested))
    assert wide[:, width:].isnan().all()


def test_layouts_of_packed_and_out(device, launched):
    shape, generator = (4, 64), torch.Generator().manual_seed(3)
    packed, absmax, _ = weight(shape, 64, device, generator)
    expected = by_reference(packed, absmax, shape, torch.float32, 64)
    shifted = torch.cat([packed[:1], packed])[1:]  # not at a multiple of four bytes
    with launched(PLAIN):
        assert same_bits(nf4_dequantize(shifted, absmax, shape, torch.float32), expected)
    column = torch.zeros(64, 4, device=device).T
    with launched(FAST):
        assert nf4_dequantize(packed.view(4, 32).T.contiguous().T, absmax, shape, torch.float32, out=column) is column
        assert same_bits(nf4_dequantize(packed, absmax, (256,), torch.float32).view(shape), expected)
    assert same_bits(column, expected)


def test_special_scales(device, launched):
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    scales = [math.inf, -math.inf, math.nan, 0.0, -0.0, -1.0, 3e38, 6e4]
    absmax = torch.tensor(scales, device=device)
    for dtype in DTYPES:
        with launched(FAST):
            actual = nf4_dequantize(packed, absmax, (8, 64), dtype)
        expected = by_reference(packed, absmax, (8, 64), dtype, 64)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert same_bits(actual.nan_to_num(1.5), expected.nan_to_num(1.5))


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(torch.float32, torch.uint8), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantized_as_by_bitsandbytes(bnb, device, launched, blocksize, dtype, storage):
    generator = torch.Generator().manual_seed(blocksize)
    x = torch.randn(8, 4100, generator=generator).to(device, dtype)
    if device == "cuda":
        x[:2] = 0  # bitsandbytes takes another number for zeros on a CPU
        x[3, :40] *= 1e-38
    packed, state = bnb.quantize_4bit(
        x, blocksize=blocksize, compress_statistics=True, quant_type="nf4", quant_storage=storage
    )
    with launched(QUANTIZE, QUANTIZE_SCALES):
        ours, numbers, nested = nf4_quantize(x, blocksize, storage=storage)
    assert ours.dtype == packed.dtype
    assert ours.shape == packed.shape
    assert torch.equal(ours.view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.code, dynamic_code(torch.device(device)))
    assert torch.equal(nested.offset, state.offset)
    if device == "cuda":
        assert torch.equal(numbers, state.absmax)
    else:  # bitsandbytes on a CPU sometimes takes the second nearest of the 8-bit numbers
        assert (numbers.int() - state.absmax.int()).abs().max() <= 1
        fractions = reference.quantize(x, blocksize, False)[1] - nested.offset
        fractions /= nested.absmax.repeat_interleave(256)[: len(fractions)]
        ours_off, theirs_off = ((nested.code[n.int()] - fractions).abs() for n in (numbers, state.absmax))
        assert (ours_off <= theirs_off + 1e-6).all()
    plain, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type="nf4", quant_storage=storage)
    with launched(QUANTIZE):
        again, absmax, nothing = nf4_quantize(x, blocksize, nested=False, storage=storage)
    assert nothing is None
    assert torch.equal(again.view(torch.uint8), plain.view(torch.uint8))
    assert same_bits(absmax, state.absmax)


def agree(ours, theirs, device):
    """Equal; on a GPU, whose reciprocal is approximate, a few numbers may be neighbours."""
    if device == "cpu":
        assert torch.equal(ours, theirs)
        return
    for shift in (0, 4):
        distance = ((ours >> shift & 15).int() - (theirs >> shift & 15).int()).abs()
        assert distance.max() <= 1
        assert distance.float().mean() < 1e-3


@settings(max_examples=20)
@given(
    count=st.integers(1, 3000), blocksize=st.sampled_from([32, 64, 512]), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_quantized_as_by_the_reference(device, launched, count, blocksize, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp(8 * torch.randn(count, generator=generator))
    x[torch.rand(count, generator=generator) < 0.1] = 0
    x = x.to(device, dtype)
    with launched(QUANTIZE):
        packed, absmax, _ = nf4_quantize(x, blocksize, nested=False)
    expected, expected_absmax, *_ = reference.quantize(x, blocksize, False)
    agree(packed.flatten(), expected, device)
    assert same_bits(absmax, expected_absmax)


def test_quantizing_what_is_not_finite(device, launched):
    x = torch.zeros(6, 64, device=device)
    x[0, 3], x[1, 5], x[2], x[3, :2] = math.nan, math.inf, math.nan, torch.tensor([1e-40, -2e-40])
    x[4], x[5] = 3e38, torch.linspace(-1, 1, 64, device=device)
    x[4, 0] = 1.0
    with launched(QUANTIZE):
        packed, absmax, _ = nf4_quantize(x, nested=False)
    expected, expected_absmax, *_ = reference.quantize(x, 64, False)
    agree(packed.flatten(), expected, device)
    assert torch.equal(absmax, expected_absmax)
    lowest = torch.finfo(torch.float32).min
    assert absmax.tolist() == [0, math.inf, lowest, 0, pytest.approx(3e38), 1]


def test_there_and_back(device, launched):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(96, 128, generator=generator).to(device, torch.bfloat16)
    packed, absmax, nested = nf4_quantize(x)
    with launched(FAST):
        y = nf4_dequantize(packed, absmax, x.shape, x.dtype, nested=nested)
    assert (y - x).float().norm() / x.float().norm() < 0.11  # half a step of sixteen, on the average
    again, _, _ = nf4_quantize(y)
    assert (again == packed).float().mean() > 0.98


@pytest.mark.parametrize("nested", [None, 256])
def test_the_reference_alone(launched, monkeypatch, nested):
    packed, absmax, nested = weight((6, 50), 32, "cpu", torch.Generator().manual_seed(4), nested)
    expected = by_reference(packed, absmax, (6, 50), torch.float16, 32, nested)
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    wide = torch.zeros(6, 60, dtype=torch.float16)
    with launched():
        assert same_bits(nf4_dequantize(packed, absmax, (6, 50), torch.float16, 32, nested=nested), expected)
        nf4_dequantize(packed, absmax, (6, 50), torch.float16, 32, nested=nested, out=wide[:, :50])
        quantized = nf4_quantize(expected.float().nan_to_num(0, 0, 0), 32)
    assert same_bits(wide[:, :50], expected)
    assert quantized[0].shape == (150, 1)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)])
def test_empty(device, launched, shape):
    with launched():
        packed, absmax, nested = nf4_quantize(torch.zeros(shape, device=device), nested=False)
        values = nf4_dequantize(packed, absmax, shape, torch.bfloat16, nested=nested)
        nf4_quantize(torch.zeros(shape, device=device))
    assert values.shape == shape


def test_rows_farther_apart_than_32_bits(launched, tmp_path, device):
    if device == "cuda":
        pytest.skip("covered by test_more_than_two_to_the_31_elements")
    packed, absmax, nested = weight((3, 64), 64, device, torch.Generator().manual_seed(6), 256)
    far = 2**30 + 6
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(2 * (2 * far + 64))  # a hole: takes neither disk nor memory but for the pages touched
        with mmap.mmap(file.fileno(), 0) as pages:
            out = torch.frombuffer(pages, dtype=torch.float16).as_strided((3, 64), (far, 1))
            with launched(PLAIN):
                nf4_dequantize(packed, absmax, (3, 64), torch.float16, nested=nested, out=out)
            assert same_bits(out, by_reference(packed, absmax, (3, 64), torch.float16, 64, nested))
            del out


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(bnb, device, launched):
    rows, width = 2**19 + 8, 4096
    x = torch.empty(rows, width, device=device, dtype=torch.bfloat16).normal_()
    with launched(QUANTIZE, QUANTIZE_SCALES):
        packed, absmax, nested = nf4_quantize(x)
    wide = torch.empty(rows, width + 64, device=device, dtype=torch.bfloat16)
    with launched(FAST):
        nf4_dequantize(packed, absmax, x.shape, x.dtype, nested=nested, out=wide[:, :width])
    error = (wide[-8:, :width].float() - x[-8:].float()).norm() / x[-8:].float().norm()
    assert error < 0.11
    del wide
    with launched(FAST):
        values = nf4_dequantize(packed, absmax, x.shape, x.dtype, nested=nested)
    assert values.isfinite().all()
    assert (values[-8:].float() - x[-8:].float()).norm() / x[-8:].float().norm() < 0.11


@pytest.mark.gpu
def test_cuda_graph(device, launched):
    x = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
    wide = torch.zeros(64, 320, device=device, dtype=torch.bfloat16)

    def step():
        packed, absmax, nested = nf4_quantize(x)
        nf4_dequantize(packed, absmax, x.shape, x.dtype, nested=nested, out=wide[:, :256])
        return packed

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with launched(FAST, QUANTIZE, QUANTIZE_SCALES), torch.cuda.graph(graph):
        replayed = step()
    x.normal_()
    graph.replay()
    result = wide.clone()
    assert torch.equal(replayed, step())
    assert torch.equal(result, wide)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(launched):
    x = torch.randn(64, 256, device="cuda:1", dtype=torch.bfloat16)
    with torch.cuda.device(0), launched(FAST, QUANTIZE, QUANTIZE_SCALES):
        packed, absmax, nested = nf4_quantize(x)
        values = nf4_dequantize(packed, absmax, x.shape, x.dtype, nested=nested)
    assert same_bits(values, by_reference(packed, absmax, x.shape, x.dtype, 64, nested))


def test_opcheck(device, launched):
    from ft_kernels.ops.nf4.autograd import nf4_dequantize_op, nf4_dequantize_out_op, nf4_quantize_op

    packed, absmax, nested = weight((4, 48), 64, device, torch.Generator().manual_seed(8), 256)
    tables = (packed, absmax, nested.absmax, nested.code, nested.offset)
    # The operations' results are integers, or random bits: nothing to differentiate.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with launched(FAST, QUANTIZE, QUANTIZE_SCALES):
        torch.library.opcheck(nf4_dequantize_op, (*tables, (4, 48), torch.float32, 64, 256), test_utils=checks)
        out = torch.zeros(4, 50, device=device)[:, :48]
        torch.library.opcheck(nf4_dequantize_out_op, (*tables, 64, 256, out), test_utils=checks)
        torch.library.opcheck(nf4_quantize_op, (torch.randn(3, 70, device=device), 32, True), test_utils=checks)
        torch.library.opcheck(nf4_quantize_op, (torch.randn(3, 70, device=device), 32, False), test_utils=checks)


def test_compile(device, launched):
    packed, absmax, nested = weight((4, 48), 64, device, torch.Generator().manual_seed(8), 256)

    def product(x):
        return x @ nf4_dequantize(packed, absmax, (4, 48), torch.float32, nested=nested).T

    x = torch.randn(2, 48, device=device, requires_grad=True)
    with launched(FAST):
        compiled = torch.compile(product, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(product(x).sum(), x)[0])


PACKED, ABSMAX = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
NESTED = NestedScales(torch.ones(1), torch.ones(256), torch.ones(()))
TWO, THREE = replace(NESTED, absmax=torch.ones(2)), replace(NESTED, blocksize=3)
NUMBERS = ABSMAX.to(torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64; allowed are"),
        ({"blocksize": 48}, ValueError, "blocksize=48; allowed are 32, 64,"),
        ({"shape": (3, 64)}, ValueError, r"packed has 64 bytes; shape \[3, 64\] needs 96"),
        ({"absmax": ABSMAX[:1]}, ValueError, "absmax has 1 elements, expected 2"),
        ({"absmax": NUMBERS}, TypeError, "absmax has dtype torch.uint8, expected torch.float32; uint8 scales need"),
        ({"absmax": ABSMAX.to("meta")}, ValueError, "absmax is on meta, packed on cpu"),
        ({"nested": NESTED}, TypeError, "absmax has dtype torch.float32, expected torch.uint8"),
        ({"absmax": NUMBERS, "nested": TWO}, ValueError, "nested.absmax has 2 elements, expected 1"),
        ({"absmax": NUMBERS, "nested": THREE}, ValueError, "nested.blocksize=3; allowed are powers of two"),
        ({"out": torch.zeros(64, 2)}, ValueError, r"out has shape \[64, 2\], the result \[2, 64\]"),
        ({"out": torch.zeros(2, 64).half()}, TypeError, "out has dtype torch.float16, the result torch.float32"),
        ({"out": torch.zeros(1, 64).expand(2, 64)}, ValueError, "out repeats elements"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        nf4_dequantize(**{"packed": PACKED, "absmax": ABSMAX, "shape": (2, 64), "dtype": torch.float32, **arguments})


def test_bad_arguments_of_quantize():
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        nf4_quantize(torch.zeros(64, dtype=torch.float64))
    with pytest.raises(ValueError, match="blocksize=16"):
        nf4_quantize(torch.zeros(64), 16)
    with pytest.raises(ValueError, match=r"x \[66\] needs 33 bytes, which do not fill numbers of torch.bfloat16"):
        nf4_quantize(torch.zeros(66), storage=torch.bfloat16)
