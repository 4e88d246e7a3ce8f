from __future__ import annotations

import math
import mmap

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ft_kernels import dispatch
from ft_kernels.functional.quantization import int8_dequantize

KERNEL = "int8_dequantize"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(shape, device, seed):
    generator = torch.Generator().manual_seed(seed)
    quantized = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    return quantized.to(device), torch.exp(torch.randn(shape[:-1], generator=generator) * 3).to(device)


def expected(quantized, scales, dtype):
    """What bitsandbytes writes, without it; on a GPU torch fuses neither product with the other."""
    return ((quantized.float() * scales[..., None]) * 7.874015718698502e-3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_for_bit_as_in_bitsandbytes(device, launched, dtype):
    bnb = pytest.importorskip("bitsandbytes.functional")
    quantized, scales = weight((300, 1000), device, 0)
    with launched(KERNEL):
        actual = int8_dequantize(quantized, scales, dtype)
    assert torch.equal(actual, bnb.int8_vectorwise_dequant(quantized, scales).to(dtype))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40), width=st.integers(1, 700), pad=st.sampled_from([0, 1, 16]), dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "slice", "transposed", "three"]), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(rows=1, width=8200, pad=0, dtype=torch.bfloat16, layout="contiguous", seed=0)
def test_any_shape_into_a_wider_row(device, launched, rows, width, pad, dtype, layout, seed):
    shape = (2, rows, width) if layout == "three" else (rows, width)
    quantized, scales = weight(shape, device, seed)
    if layout == "slice":
        quantized = torch.nn.functional.pad(quantized, (1, 3))[:, 1:-3]
    elif layout == "transposed":
        quantized = quantized.T.contiguous().T
    elif layout == "three":
        quantized = torch.nn.functional.pad(quantized, (0, 0, 1, 1))[:, 1:-1]
    wide = torch.full((*shape[:-1], width + pad), math.nan, dtype=dtype, device=device)
    out = wide[..., :width]
    with launched(KERNEL):
        assert int8_dequantize(quantized, scales[..., None], dtype, out=out) is out
        assert torch.equal(int8_dequantize(quantized, scales, dtype), out)
    assert torch.equal(out, expected(quantized, scales, dtype))
    assert wide[..., width:].isnan().all()


def test_out_of_any_strides(device, launched):
    quantized, scales = weight((6, 10), device, 1)
    out = torch.zeros(10, 6, device=device).T
    with launched(KERNEL):
        int8_dequantize(quantized, scales, out=out)
    assert torch.equal(out, expected(quantized, scales, torch.float32))


def test_the_reference_alone(launched, monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    quantized, scales = weight((2, 6, 10), "cpu", 1)
    wide = torch.zeros(2, 6, 12, dtype=torch.bfloat16)
    with launched():
        int8_dequantize(quantized, scales, torch.bfloat16, out=wide[..., :10])
        assert torch.equal(int8_dequantize(quantized, scales, torch.bfloat16), wide[..., :10])
    assert torch.equal(wide[..., :10], expected(quantized, scales, torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(device, launched, shape):
    with launched():
        quantized = torch.zeros(shape, dtype=torch.int8, device=device)
        values = int8_dequantize(quantized, torch.ones(shape[0], device=device))
    assert values.shape == shape


def test_rows_farther_apart_than_32_bits(launched, tmp_path, device):
    if device == "cuda":
        pytest.skip("covered by test_more_than_two_to_the_31_elements")
    quantized, scales = weight((3, 64), device, 2)
    far = 2**30 + 6
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(2 * (2 * far + 64))  # a hole: takes neither disk nor memory but for the pages touched
        with mmap.mmap(file.fileno(), 0) as pages:
            out = torch.frombuffer(pages, dtype=torch.float16).as_strided((3, 64), (far, 1))
            with launched(KERNEL):
                int8_dequantize(quantized, scales, torch.float16, out=out)
            assert torch.equal(out, expected(quantized, scales, torch.float16))
            del out


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, launched):
    quantized = torch.randint(-128, 128, (2**19 + 8, 4096), device=device, dtype=torch.int8)
    scales = torch.rand(2**19 + 8, device=device)
    with launched(KERNEL):
        values = int8_dequantize(quantized, scales, torch.bfloat16)
    assert torch.equal(values[-9:], expected(quantized[-9:], scales[-9:], torch.bfloat16))
    assert values.isfinite().all()


@pytest.mark.gpu
def test_cuda_graph(device, launched):
    quantized, scales = weight((64, 256), device, 3)
    out = torch.zeros(64, 320, device=device, dtype=torch.bfloat16)[:, :256]
    int8_dequantize(quantized, scales, torch.bfloat16, out=out)
    graph = torch.cuda.CUDAGraph()
    with launched(KERNEL), torch.cuda.graph(graph):
        int8_dequantize(quantized, scales, torch.bfloat16, out=out)
    scales.mul_(3)
    graph.replay()
    assert torch.equal(out, expected(quantized, scales, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(launched):
    quantized, scales = weight((64, 256), "cuda:1", 3)
    with torch.cuda.device(0), launched(KERNEL):
        values = int8_dequantize(quantized, scales, torch.bfloat16)
    assert torch.equal(values, expected(quantized, scales, torch.bfloat16))


def test_opcheck(device, launched):
    from ft_kernels.ops.int8.autograd import int8_dequantize_op, int8_dequantize_out_op

    quantized, scales = weight((6, 10), device, 1)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with launched(KERNEL):
        torch.library.opcheck(int8_dequantize_op, (quantized, scales, torch.bfloat16), test_utils=checks)
        out = torch.zeros(6, 12, device=device)[:, :10]
        torch.library.opcheck(int8_dequantize_out_op, (quantized, scales, out), test_utils=checks)


def test_compile(device, launched):
    quantized, scales = weight((6, 10), device, 1)

    def product(x):
        return x @ int8_dequantize(quantized, scales).T

    x = torch.randn(2, 10, device=device)
    with launched(KERNEL):
        compiled = torch.compile(product, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        result = compiled(x)
    torch.testing.assert_close(result, product(x))


QUANTIZED, SCALES = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantized": QUANTIZED.int()}, TypeError, "quantized has dtype torch.int32, expected torch.int8"),
        ({"scales": SCALES.half()}, TypeError, "scales have dtype torch.float16, expected torch.float32"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64; allowed are"),
        ({"scales": SCALES[:1]}, ValueError, r"quantized \[2, 3\] and scales \[1\] do not fit"),
        ({"scales": SCALES.to("meta")}, ValueError, "scales are on meta, quantized on cpu"),
        ({"out": torch.zeros(2, 4)}, ValueError, r"out has shape \[2, 4\], the result \[2, 3\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        int8_dequantize(**{"quantized": QUANTIZED, "scales": SCALES, **arguments})
