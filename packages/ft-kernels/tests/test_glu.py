from __future__ import annotations

import math
import mmap

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import dispatch
from ft_kernels.functional.activations import geglu, swiglu
from ft_kernels.nn.activations import GEGLU, SwiGLU
from ft_kernels.ops.glu import reference

FORWARD, BACKWARD = "glu_forward", "glu_backward"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OURS = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": lambda gate, up=None, **kw: geglu(gate, up, approximate="tanh", **kw),
}
PLAIN = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}
# The same functions, in forms of which float64 leaves something far below zero: 1 + erf and 1 + tanh cancel there.
EXACT = {
    "silu": PLAIN["silu"],
    "gelu": lambda gate, up: gate * torch.special.ndtr(gate) * up,
    "gelu_tanh": lambda gate, up: gate * torch.sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)) * up,
}


def normal(shape, dtype, device, scale, generator):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def laid_out(layout, rows, width, dtype, device, scale, generator):
    """Gate and up [..., width] (for "packed", one tensor and None) in one of the layouts that models hand over."""

    def make(*shape):
        return normal(shape, dtype, device, scale, generator)

    if layout == "packed":
        return make(2, rows, 2 * width), None
    if layout == "packed sequence slice":
        return make(2, rows + 1, 2 * width)[:, 1:], None
    if layout == "packed, transposed":
        return make(2 * width, rows).T, None
    if layout == "halves":
        return make(rows, 2 * width).chunk(2, -1)
    if layout == "interleaved":
        return make(rows, width, 2).unbind(-1)
    if layout == "expanded":
        return make(rows, 1, width).expand(rows, 2, width), make(rows, 2, width)
    if layout == "repeated":
        return make(1, rows, width).expand(2, rows, width), make(2, rows, width)
    return make(rows, width), make(rows, width)


LAYOUTS = [
    "contiguous", "packed", "packed sequence slice", "packed, transposed", "halves", "interleaved", "expanded",
    "repeated",
]  # fmt: skip


def both(function, gate, up, dh):
    leaves = [t.detach().requires_grad_() for t in (gate, up) if t is not None]
    h = function(*leaves)
    gradients = torch.autograd.grad(h, leaves, dh.to(h.dtype))
    if up is None:
        gradients = gradients[0].chunk(2, -1)
    return [h, *gradients]


def judge(exact_enough, launched, kind, gate, up, dh, kernels=(FORWARD, BACKWARD)):
    with launched(*kernels):
        actual = both(OURS[kind], gate, up, dh)
    plain_gate, plain_up = gate.chunk(2, -1) if up is None else (gate, up)
    eager = both(PLAIN[kind], plain_gate, plain_up, dh)
    exact = both(EXACT[kind], plain_gate.double(), plain_up.double(), dh.double())
    for name, *three in zip(("h", "dgate", "dup"), actual, eager, exact, strict=True):
        assert three[0].dtype == gate.dtype
        exact_enough(name, *three)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 24), width=st.integers(1, 600), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(list(OURS)), scale=st.sampled_from([1e-3, 1.0, 10.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(rows=1, width=1, layout="contiguous", dtype=torch.float32, kind="silu", scale=1.0, seed=0)
@example(rows=1, width=1, layout="packed", dtype=torch.float32, kind="gelu", scale=1.0, seed=1)
@example(rows=2, width=2049, layout="halves", dtype=torch.bfloat16, kind="silu", scale=1.0, seed=2)
@example(rows=3, width=8, layout="repeated", dtype=torch.float32, kind="silu", scale=1.0, seed=4)
@example(rows=3, width=2816, layout="packed", dtype=torch.float16, kind="gelu_tanh", scale=1.0, seed=3)
def test_exact(device, exact_enough, launched, rows, width, layout, dtype, kind, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up = laid_out(layout, rows, width, dtype, device, scale, generator)
    shape = (*gate.shape[:-1], width)
    judge(exact_enough, launched, kind, gate, up, normal(shape, dtype, device, 1.0, generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(OURS))
def test_each_part_of_the_line_is_exact(device, exact_enough, launched, kind, dtype):
    """Every magnitude by itself: with all of them together only the largest results would count."""
    for low, high in ((-40, -8), (-8, -4), (-4, -1), (-1, -0.1), (-0.1, 0), (0, 0.1), (0.1, 3), (3, 60)):
        gate = torch.linspace(low, high, 400, dtype=torch.float64).to(dtype).to(device)[None]
        generator = torch.Generator().manual_seed(5)
        up, dh = (normal(gate.shape, dtype, device, 1.0, generator) for _ in range(2))
        judge(exact_enough, launched, kind, gate, up, dh)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: infinities are the point here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(OURS))
def test_extreme_values_are_as_in_torch(device, launched, kind, dtype):
    inf, most = math.inf, torch.finfo(dtype).max
    gates = [0.0, -0.0, 88, -88, 104, -104, 1e4, -1e4, most, -most, torch.finfo(dtype).tiny, inf, -inf, math.nan]
    ups = [1.0, -2.0, 0.0]
    gate, up = torch.cartesian_prod(torch.tensor(gates), torch.tensor(ups)).to(dtype).to(device).T.contiguous()
    dh = torch.ones_like(gate)
    with launched(FORWARD, BACKWARD):
        actual = both(OURS[kind], gate, up, dh)
    for ours, eager in zip(actual, both(PLAIN[kind], gate.double(), up.double(), dh.double()), strict=True):
        # What float64 has as a number we have too, rounded (overflow to infinity included); nan only where it has nan.
        eager = eager.to(dtype)
        assert torch.equal(ours.isnan(), eager.isnan())
        torch.testing.assert_close(ours, eager, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(OURS))
def test_the_reference_is_exact_too(exact_enough, launched, monkeypatch, kind, dtype):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    generator = torch.Generator().manual_seed(4)
    gate, up, dh = (normal((64, 300), dtype, "cpu", 1.0, generator) for _ in range(3))
    judge(exact_enough, launched, kind, gate, up, dh, kernels=())
    judge(exact_enough, launched, kind, torch.cat([gate, up], -1), None, dh, kernels=())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["wider row", "sequence slice", "transposed"])
def test_output_where_the_caller_wants_it(device, launched, dtype, place):
    generator = torch.Generator().manual_seed(6)
    packed = normal((2, 5, 140), dtype, device, 1.0, generator)
    wide = torch.full((2, 7, 90), math.nan, dtype=dtype, device=device)
    out = {"wider row": wide[:, :5, :70], "sequence slice": wide[:, 2:, 20:], "transposed": wide.mT[:, 3:73, :5].mT}
    expected = swiglu(packed)
    with launched(FORWARD):
        result = swiglu(packed, out=out[place])
    assert result is out[place]
    assert torch.equal(result, expected)
    assert wide.isnan().sum() == wide.numel() - expected.numel()  # nothing else was written


def test_output_where_the_caller_wants_it_by_the_reference():
    packed, wide = torch.randn(3, 8, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.float64)
    result = geglu(packed, out=wide[:, :4])
    assert torch.equal(wide[:, :4], geglu(packed))
    assert result.data_ptr() == wide.data_ptr()
    assert wide[:, 4:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(OURS))
def test_backward_over_the_inputs(device, launched, kind, dtype):
    """What a fused layer does: gradients over gate and up, and the output once more, into a wider row."""
    from ft_kernels.ops.glu import kernels

    generator = torch.Generator().manual_seed(7)
    packed = normal((6, 2 * 45), dtype, device, 1.0, generator)
    dh = normal((6, 45), dtype, device, 1.0, generator)
    number = reference.KINDS.index(kind)
    expected_h, *expected = both(OURS[kind], packed, None, dh)
    wide = torch.full((6, 64), math.nan, dtype=dtype, device=device)
    gate, up = reference.halves(packed, None)
    with launched(BACKWARD):
        dgate, dup = kernels.backward(dh, packed, None, number, dgate=gate, dup=up, h=wide[:, :45])
    assert dgate is gate
    assert dup is up
    assert torch.equal(packed, torch.cat(expected, -1))
    assert torch.equal(wide[:, :45], expected_h)
    assert wide[:, 45:].isnan().all()


def test_backward_of_the_reference():
    gate, up, dh = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    for kind in OURS:
        dgate, dup, h = reference.backward(dh, gate, up, reference.KINDS.index(kind))
        for ours, exact in zip((h, dgate, dup), both(PLAIN[kind], gate, up, dh), strict=True):
            torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, launched, shape):
    gate, up = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    with launched():
        h = swiglu(gate, up)
        h.sum().backward()
        assert geglu(torch.randn(shape, device=device)).shape == (*shape[:-1], shape[-1] // 2)
    assert h.shape == gate.grad.shape == up.grad.shape == shape


def test_rows_farther_apart_than_32_bits(exact_enough, launched, tmp_path, device):
    if device == "cuda":
        pytest.skip("covered by test_more_than_two_to_the_31_elements")
    far = 2**30 + 6
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(2 * (2 * far + 64))  # a hole: takes neither disk nor memory but for the pages touched
        with mmap.mmap(file.fileno(), 0) as pages:
            packed = torch.frombuffer(pages, dtype=torch.float16).as_strided((3, 64), (far, 1))
            packed.copy_(torch.randn(3, 64))
            judge(exact_enough, launched, "silu", packed, None, torch.randn(3, 32).half())
            del packed


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, launched):
    packed = torch.empty(2**19 + 3, 4096, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    with launched(FORWARD, BACKWARD):
        h = swiglu(packed)
        (gradient,) = torch.autograd.grad(h, packed, h.detach())
    last = packed[-4:].detach().double().requires_grad_()
    exact = swiglu(last)
    (exact_gradient,) = torch.autograd.grad(exact, last, h[-4:].double())
    torch.testing.assert_close(h[-4:].double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(gradient[-4:].double(), exact_gradient, rtol=2**-8, atol=1e-6)
    assert torch.isfinite(gradient).all()


@pytest.mark.gpu
def test_cuda_graph(device, launched):
    packed = torch.randn(8, 1000, device=device, dtype=torch.bfloat16, requires_grad=True)
    wide = torch.zeros(8, 564, device=device, dtype=torch.bfloat16)

    def step():
        with torch.no_grad():
            swiglu(packed, out=wide[:, :500])
        h = geglu(packed, approximate="tanh")
        return h, torch.autograd.grad(h.sum(), packed)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with launched(FORWARD, BACKWARD), torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        packed.copy_(torch.randn_like(packed))
    graph.replay()
    torch.testing.assert_close(replayed, step(), rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(wide[:, :500], swiglu(packed))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(launched):
    packed = torch.randn(4, 64, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0), launched(FORWARD, BACKWARD):
        h = swiglu(packed)
        h.sum().backward()
    torch.testing.assert_close(h.cpu(), swiglu(packed.detach().cpu()))


@pytest.mark.parametrize("kind", list(OURS))
def test_gradcheck_of_the_reference(kind):
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    packed = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for inputs in ((gate, up), (packed,)):
        assert torch.autograd.gradcheck(OURS[kind], inputs)
        assert torch.autograd.gradgradcheck(OURS[kind], inputs)


def test_opcheck(device, launched):
    from ft_kernels.ops.glu.autograd import glu_backward_op, glu_op, glu_out_op

    gate, up = (torch.randn(2, 3, 48, device=device, requires_grad=True) for _ in range(2))
    plain = gate.detach()
    with launched(FORWARD, BACKWARD):
        torch.library.opcheck(glu_op, (gate, up, 0))
        torch.library.opcheck(glu_op, (gate, None, 1))
        torch.library.opcheck(glu_backward_op, (plain[..., :24], plain, None, 2))
        torch.library.opcheck(glu_out_op, (plain, up.detach(), 0, torch.zeros(2, 3, 50, device=device)[..., :48]))


@pytest.mark.parametrize("layer", [SwiGLU(), GEGLU("tanh")])
def test_compile(device, launched, layer):
    packed = torch.randn(4, 96, device=device, requires_grad=True)
    with launched(FORWARD, BACKWARD):
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        (gradient,) = torch.autograd.grad(compiled(packed).square().sum(), packed)
    (expected,) = torch.autograd.grad(layer(packed).square().sum(), packed)
    torch.testing.assert_close(gradient, expected)


def test_layers():
    gate, up = torch.randn(2, 5, 6, dtype=torch.float64)
    packed = torch.cat([gate, up], -1)
    torch.testing.assert_close(SwiGLU()(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(SwiGLU()(packed), F.silu(gate) * up)
    torch.testing.assert_close(GEGLU()(packed), F.gelu(gate) * up)
    torch.testing.assert_close(GEGLU("tanh")(gate, up), F.gelu(gate, approximate="tanh") * up)
    assert repr(GEGLU("tanh")) == "GEGLU(approximate='tanh')"
    assert list(SwiGLU().state_dict()) == []


GATE = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate": GATE.long()}, TypeError, "gate has dtype torch.int64; use a floating-point"),
        ({"gate": torch.tensor(1.0)}, ValueError, "gate has no dimension"),
        ({"gate": torch.zeros(2, 3)}, ValueError, r"gate has shape \[2, 3\] and up is None"),
        ({"up": torch.zeros(2, 3)}, ValueError, r"up has shape \[2, 3\]; gate \[2, 4\] needs \[2, 4\]"),
        ({"up": GATE.half()}, TypeError, "up has dtype torch.float16, gate torch.float32"),
        ({"up": GATE.to("meta")}, ValueError, "up is on meta, gate on cpu"),
        ({"out": torch.zeros(2, 4)}, ValueError, r"out has shape \[2, 4\]; gate \[2, 4\] needs \[2, 2\]"),
        ({"out": torch.zeros(1, 2).expand(2, 2)}, ValueError, "out repeats elements"),
        ({"gate": torch.zeros(2, 4, requires_grad=True), "out": torch.zeros(2, 2)}, RuntimeError, "cannot record grad"),
        ({"approximate": "erf"}, ValueError, "approximate='erf'; allowed are"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        geglu(**{"gate": GATE, **arguments})
