from __future__ import annotations

import math
import mmap

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ft_kernels import dispatch
from ft_kernels.functional.quantization import fp8_quantize
from ft_kernels.ops.fp8 import reference

KERNELS = {"row": "fp8_quantize_rows", "1x128": "fp8_quantize_groups", "128x128": "fp8_quantize_blocks"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# numpy's, in the interpreter: infinities and nan are the point in places
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def spread(scale, shape, scaling):
    """Each value's scale, in x's shape."""
    if scaling == "128x128":
        scale = scale.repeat_interleave(128, 0)[: shape[0]]
    if scaling != "row":
        scale = scale.repeat_interleave(128, -1)[..., : shape[-1]]
    return scale.expand(shape)


def bytes_of(numbers):
    return numbers.contiguous().view(torch.uint8)


def judge(x, scaling, numbers, scale):
    """By the definition: torch's own cast of the scaled values; and, in float64, half a step of e4m3fn."""
    assert numbers.dtype == torch.float8_e4m3fn
    assert numbers.shape == x.shape
    assert numbers.is_contiguous()
    again, again_scale = reference.quantize(x, reference.SCALINGS.index(scaling))
    assert torch.equal(scale, again_scale)
    assert scale.stride() == again_scale.stride()
    assert torch.equal(bytes_of(numbers), bytes_of(again))
    each = spread(scale, x.shape, scaling).double()
    values = numbers.double() * each
    step = torch.maximum(x.double().abs() * 2**-4, each * 2**-10)  # half a unit of a 3-bit mantissa; of the smallest
    assert ((values - x.double()).abs() <= step * (1 + 1e-6)).all()
    # The largest magnitude of each group is used to the full.
    assert (numbers.double().abs().amax() == 448) or x.numel() == 0 or x.abs().max().double() < 448 * 2.0**-126


@settings(max_examples=30)
@given(
    rows=st.integers(1, 300), width=st.integers(1, 700), scaling=st.sampled_from(list(KERNELS)),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(["contiguous", "slice", "transposed", "three"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@example(rows=2, width=17000, scaling="row", dtype=torch.bfloat16, layout="contiguous", seed=0)
@example(rows=3, width=16384, scaling="1x128", dtype=torch.float32, layout="slice", seed=1)
@example(rows=256, width=640, scaling="128x128", dtype=torch.bfloat16, layout="transposed", seed=2)
def test_exact(device, launched, rows, width, scaling, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.exp(2 * torch.randn(rows, width, generator=generator))
    x[torch.rand(rows, width, generator=generator) < 0.05] = 0
    x = x.to(device, dtype)
    if layout == "slice":
        x = torch.nn.functional.pad(x, (1, 3))[:, 1:-3]
    elif layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "three" and scaling != "128x128":
        x = torch.stack([x, x * 3, x], 1)[:, 1:]
    with launched(KERNELS[scaling]):
        numbers, scale = fp8_quantize(x, scaling)
    judge(x, scaling, numbers, scale)


@pytest.mark.parametrize("scaling", list(KERNELS))
def test_every_rounding_is_torchs(device, launched, scaling):
    """Each e4m3fn number, the middles between them (ties) and what lies next to those, at scale 1."""
    numbers = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:-1]
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(1e3))])
    x = torch.nn.functional.pad(torch.cat([x, -x]), (0, -2 * len(x) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (1, 0), value=448).to(device)  # makes every scale 1
    with launched(KERNELS[scaling]):
        result, scale = fp8_quantize(x, scaling)
    assert scale.eq(1).all()
    assert torch.equal(bytes_of(result), bytes_of(x.to(torch.float8_e4m3fn)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", list(KERNELS))
def test_values_that_are_not_finite_spoil_their_group_and_no_other(device, launched, scaling, dtype):
    x = torch.randn(384, 384, device=device).to(dtype)
    x[0, 5], x[130, 7], x[260, 9] = math.nan, math.inf, -math.inf
    with launched(KERNELS[scaling]):
        numbers, scale = fp8_quantize(x, scaling)
    values = numbers.float() * spread(scale, x.shape, scaling)
    assert scale[0, 0].isnan()
    last = 2 if scaling == "128x128" else 260
    assert scale[1 if scaling == "128x128" else 130, 0].isinf()
    assert scale[last, 0].isinf()
    down = 128 if scaling == "128x128" else 1
    across = 384 if scaling == "row" else 128
    for row in (0, 130, 260):
        row = row // down * down
        assert values[row : row + down, :across].isnan().all()
        values[row : row + down, :across] = 0
    assert values.isfinite().all()
    again, again_scale = reference.quantize(x, reference.SCALINGS.index(scaling))
    assert torch.equal(numbers.float().isnan(), again.float().isnan())
    assert torch.equal(scale.nan_to_num(1.5), again_scale.nan_to_num(1.5))


@pytest.mark.parametrize("scaling", list(KERNELS))
def test_zeros_and_tiny_and_huge_values(device, launched, scaling):
    x = torch.zeros(512, 256, device=device)
    x[128:256] = torch.linspace(-1e-40, 1e-40, 256)
    x[256:384] = torch.linspace(-1, 1, 256) * 3.4e38
    x[384:] = torch.linspace(-448 * 2.0**-126, 448 * 2.0**-126, 256)
    with launched(KERNELS[scaling]):
        numbers, scale = fp8_quantize(x, scaling)
    assert torch.equal(bytes_of(numbers[:128]), torch.zeros(128, 256, dtype=torch.uint8, device=device))
    assert scale.flatten()[0] == 2.0**-126
    assert numbers.float().isfinite().all()
    assert numbers[256:384].float().abs().max() == 448
    again, again_scale = reference.quantize(x, reference.SCALINGS.index(scaling))
    assert torch.equal(scale, again_scale)
    assert torch.equal(bytes_of(numbers[256:]), bytes_of(again[256:]))


def test_the_reference_alone(launched, monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    x = torch.randn(130, 200)
    with launched():
        for scaling in KERNELS:
            judge(x, scaling, *fp8_quantize(x, scaling))
    row = fp8_quantize(x[:1])[1]
    assert row == (x[0].abs().max() * torch.tensor(1 / 448))
    assert fp8_quantize(x.view(2, 65, 200), "1x128")[1].shape == (2, 65, 2)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty(device, launched, shape):
    with launched():
        for scaling in KERNELS:
            numbers, scale = fp8_quantize(torch.zeros(shape, device=device), scaling)
            assert numbers.shape == shape
            assert scale.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 products"
)
def test_scaled_mm_takes_it(device):
    x = torch.randn(256, 1024, device=device, dtype=torch.bfloat16)
    weight = torch.randn(512, 1024, device=device, dtype=torch.bfloat16)
    exact = x.double() @ weight.double().T
    pairs = [("row", "row")]
    if torch.cuda.get_device_capability() == (9, 0) and tuple(map(int, torch.version.cuda.split("."))) >= (12, 9):
        pairs.append(("1x128", "128x128"))
    for first, second in pairs:
        qx, sx = fp8_quantize(x, first)
        qw, sw = fp8_quantize(weight, second)
        y = torch._scaled_mm(qx, qw.t(), scale_a=sx, scale_b=sw.t(), out_dtype=torch.bfloat16)
        assert (y.double() - exact).norm() / exact.norm() < 0.05


def test_rows_farther_apart_than_32_bits(launched, tmp_path, device):
    if device == "cuda":
        pytest.skip("covered by test_more_than_two_to_the_31_elements")
    far = 2**30 + 6
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(2 * (2 * far + 64))  # a hole: takes neither disk nor memory but for the pages touched
        with mmap.mmap(file.fileno(), 0) as pages:
            x = torch.frombuffer(pages, dtype=torch.float16).as_strided((3, 64), (far, 1))
            x.copy_(torch.randn(3, 64))
            for scaling, kernel in KERNELS.items():
                with launched(kernel):
                    numbers, scale = fp8_quantize(x, scaling)
                judge(x, scaling, numbers, scale)
            del x


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", list(KERNELS))
def test_more_than_two_to_the_31_elements(device, launched, scaling):
    x = torch.empty(2**19 + 128, 4096, device=device, dtype=torch.bfloat16).normal_()
    with launched(KERNELS[scaling]):
        numbers, scale = fp8_quantize(x, scaling)
    last_scale = scale[-1:] if scaling == "128x128" else scale[-128:]
    again, again_scale = reference.quantize(x[-128:], reference.SCALINGS.index(scaling))
    assert torch.equal(last_scale, again_scale)
    assert torch.equal(bytes_of(numbers[-128:]), bytes_of(again))


@pytest.mark.gpu
def test_cuda_graph(device, launched):
    x = torch.randn(256, 512, device=device, dtype=torch.bfloat16)
    for scaling in KERNELS:
        fp8_quantize(x, scaling)
        graph = torch.cuda.CUDAGraph()
        with launched(KERNELS[scaling]), torch.cuda.graph(graph):
            numbers, scale = fp8_quantize(x, scaling)
        x.normal_()
        graph.replay()
        judge(x, scaling, numbers, scale)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(launched):
    x = torch.randn(256, 512, device="cuda:1", dtype=torch.bfloat16)
    for scaling, kernel in KERNELS.items():
        with torch.cuda.device(0), launched(kernel):
            numbers, scale = fp8_quantize(x, scaling)
        judge(x, scaling, numbers, scale)


@pytest.mark.gpu
def test_cards_without_fp8_get_the_same(device, launched, monkeypatch):
    from ft_kernels import tuning

    x = torch.randn(256, 512, device=device) * torch.exp(4 * torch.randn(256, 512, device=device))
    for scaling, kernel in KERNELS.items():
        expected, expected_scale = fp8_quantize(x, scaling)
        with monkeypatch.context() as patch, launched(kernel):
            patch.setattr(tuning, "capability", lambda device: (7, 5))
            numbers, scale = fp8_quantize(x, scaling)
        assert torch.equal(bytes_of(numbers), bytes_of(expected))
        assert torch.equal(scale, expected_scale)


def test_opcheck(device, launched):
    from ft_kernels.ops.fp8.autograd import fp8_quantize_op

    x = torch.randn(6, 200, device=device)
    checks = ("test_schema", "test_faketensor")
    for number, scaling in enumerate(KERNELS):
        with launched(KERNELS[scaling]):
            torch.library.opcheck(fp8_quantize_op, (x, number), test_utils=checks)


def test_compile(device, launched):
    def there_and_back(x):
        numbers, scale = fp8_quantize(x)
        return numbers.float() * scale

    x = torch.randn(6, 200, device=device)
    with launched(KERNELS["row"]):
        compiled = torch.compile(
            there_and_back, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
        )
        result = compiled(x)
    assert torch.equal(result, there_and_back(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scaling": "tensor"}, ValueError, "scaling='tensor'; allowed are 'row', '1x128', '128x128'"),
        ({"x": torch.zeros(2, 2, dtype=torch.float64)}, TypeError, "x has dtype torch.float64; allowed are"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\]; scaling 'row' needs \[..., K\]"),
        ({"x": torch.zeros(2, 2, 2), "scaling": "128x128"}, ValueError, r"scaling '128x128' needs \[N, K\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fp8_quantize(**{"x": torch.zeros(2, 2), **arguments})
