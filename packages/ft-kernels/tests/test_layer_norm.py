from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import dispatch, layer_norm, nn

FORWARD, BACKWARD, SUMS = "layer_norm_forward", "layer_norm_backward", "layer_norm_sums"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "packed heads", "transposed", "expanded", "four strides"]


def laid_out(layout, rows, h, dtype, device, scale, shift, generator):
    """A tensor [..., h] of normal numbers around a mean that may be far from 0, in a layout that models hand over."""

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift * scale
        return values.to(dtype).to(device)

    if layout == "packed heads":
        return normal(rows, 3, 2 * h)[:, 1:, h:]
    if layout == "transposed":
        return normal(h, rows).T
    if layout == "expanded":
        return normal(rows, 1, h).expand(rows, 2, h)
    if layout == "four strides":
        return normal(2, rows + 1, 3, 2 * h).transpose(0, 2)[:, 1:, :, :h]
    return normal(rows, h)


def plain(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def both(function, x, weight, bias, dy, eps):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, eps)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def judge(exact_enough, launched, x, weight, bias, dy, eps, kernels=None):
    given_tensors = [t for t in (weight, bias) if t is not None]
    if kernels is None:
        kernels = (FORWARD, BACKWARD, SUMS) if given_tensors else (FORWARD, BACKWARD)
    with launched(*kernels):
        actual = both(layer_norm, x, weight, bias, dy, eps)
    eager = both(plain, x, weight, bias, dy, eps)
    exact = both(plain, *(None if t is None else t.double() for t in (x, weight, bias, dy)), eps)
    names = ["y", "dx", *(name for name, t in (("dweight", weight), ("dbias", bias)) if t is not None)]
    for name, *three in zip(names, actual, eager, exact, strict=True):
        assert three[0].dtype == x.dtype
        exact_enough(name, *three)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 24), h=st.integers(1, 600), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
    has_weight=st.booleans(), has_bias=st.booleans(), eps=st.sampled_from([1e-12, 1e-5]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]), shift=st.sampled_from([0.0, 10.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(
    rows=3, h=1, layout="contiguous", dtype=torch.float32, has_weight=True, has_bias=True, eps=1e-5, scale=1.0,
    shift=0.0, seed=0,
)  # fmt: skip
@example(
    rows=20, h=2, layout="packed heads", dtype=torch.bfloat16, has_weight=True, has_bias=False, eps=1e-5, scale=1.0,
    shift=0.0, seed=1,
)  # fmt: skip
def test_exact(
    device, exact_enough, launched, rows, h, layout, dtype, has_weight, has_bias, eps, scale, shift, seed
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = laid_out(layout, rows, h, dtype, device, scale, shift, generator)
    weight, bias = (
        torch.randn(h, generator=generator).to(device, dtype) if has else None for has in (has_weight, has_bias)
    )
    dy = torch.randn(x.shape, generator=generator).to(device, dtype)
    judge(exact_enough, launched, x, weight, bias, dy, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [64, 1000])
def test_rows_longer_than_a_block(device, exact_enough, launched, monkeypatch, dtype, h):
    from ft_kernels.ops.rms_norm import tilings

    monkeypatch.setattr(tilings, "MAX_BLOCK", 64)
    generator = torch.Generator().manual_seed(h)
    x, dy = torch.randn(2, 7, h, generator=generator).to(device, dtype).unbind()
    weight, bias = torch.randn(2, h, generator=generator).to(device, dtype).unbind()
    judge(exact_enough, launched, x + 3, weight, bias, dy, 1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15, 3e38])
def test_extreme_values(device, exact_enough, launched, value):
    x = torch.full((4, 96), value, device=device)
    x[:, ::3] *= -0.5  # no constant row: what is left of one is rounding, in float64 too
    weight, bias = torch.ones(2, 96, device=device).unbind()
    judge(exact_enough, launched, x, weight, bias, torch.ones_like(x).cumsum(-1), 1e-5)


def test_eps_that_dominates(device, exact_enough, launched):
    generator = torch.Generator().manual_seed(5)  # eps must be known better than fp32 knows it
    x, dy = (torch.randn(2, 64, 128, generator=generator) * 1e-4).to(device).unbind()
    judge(exact_enough, launched, x, torch.randn(128, generator=generator).to(device), None, dy, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_exact_too(exact_enough, launched, monkeypatch, dtype):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    generator = torch.Generator().manual_seed(4)
    x, dy = torch.randn(2, 256, 300, generator=generator).to(dtype).unbind()
    weight, bias = torch.randn(2, 300, generator=generator).to(dtype).unbind()
    judge(exact_enough, launched, x, weight, bias, dy, 1e-5, kernels=())


def test_parameters_of_other_dtypes(device, launched):
    x = torch.randn(5, 40, device=device).half()
    weight = torch.randn(40, device=device, requires_grad=True)
    bias = torch.randn(40, device=device, dtype=torch.bfloat16, requires_grad=True)
    with launched(FORWARD, BACKWARD, SUMS):
        y = layer_norm(x, weight, bias)
        y.sum().backward()
    assert (y.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.float16, torch.float32, torch.bfloat16)
    exact = F.layer_norm(x.double(), (40,))
    torch.testing.assert_close(weight.grad.double(), exact.sum(0), rtol=1e-5, atol=1e-5)
    assert (bias.grad == 5).all()


def test_frozen_parameters_have_no_gradient(device, launched):
    x = torch.randn(5, 40, device=device, requires_grad=True)
    weight, bias = torch.ones(2, 40, device=device).unbind()
    with launched(FORWARD, BACKWARD):
        layer_norm(x, weight, bias).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, launched, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.ones(shape[-1], device=device, requires_grad=True) for _ in range(2))
    with launched():
        y = layer_norm(x, weight, bias)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(device, launched, dtype):
    x = torch.randn(3, 4, 40, device=device).to(dtype)
    weight, bias = torch.randn(2, 40, device=device).to(dtype).unbind()
    wide = torch.full((3, 5, 56), 7.0, device=device, dtype=dtype)
    with launched(FORWARD):
        expected = layer_norm(x, weight, bias)
        assert layer_norm(x, weight, bias, out=wide[:, :4, :40]).data_ptr() == wide.data_ptr()
        permuted = layer_norm(x, weight, bias, out=torch.empty(40, 4, 3, device=device, dtype=dtype).permute(2, 1, 0))
    assert torch.equal(wide[:, :4, :40], expected)
    assert torch.equal(permuted, expected)
    assert (wide[:, 4] == 7).all()
    assert (wide[..., 40:] == 7).all()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, launched):
    x = torch.empty(2**20 + 3, 2048, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    with launched(FORWARD, BACKWARD):
        y = layer_norm(x)
        (dx,) = torch.autograd.grad(y, x, y.detach() * 2 + 1)
    last = x[-4:].detach().double().requires_grad_()
    exact = layer_norm(last)
    (exact_dx,) = torch.autograd.grad(exact, last, (y[-4:].detach() * 2 + 1).double())
    torch.testing.assert_close(y[-4:].double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(dx[-4:].double(), exact_dx, rtol=2**-8, atol=1e-2)
    assert torch.isfinite(dx).all()


@pytest.mark.gpu
def test_device_that_is_not_current_and_graph(device, launched):
    target = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.randn(64, 4096, device=target, dtype=torch.bfloat16, requires_grad=True)
    layer = nn.LayerNorm(4096, device=target, dtype=torch.bfloat16)

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], y.detach())]

    expected = [t.detach() for t in step()]  # without a graph, whose nodes belong to the stream that made it
    with torch.cuda.device(target):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with launched(FORWARD, BACKWARD, SUMS), torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)


def test_gradcheck_of_the_reference():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(layer_norm, (x, weight, bias))


@pytest.mark.parametrize("need", [(True, True, True), (True, False, True), (False, True, False)])
def test_opcheck(device, launched, need):
    from ft_kernels.ops.layer_norm.autograd import layer_norm_op, layer_norm_out_op

    shapes = ((2, 3, 48), (48,), (48,))
    x, weight, bias = (torch.randn(s, device=device, requires_grad=n) for s, n in zip(shapes, need, strict=True))
    with launched(FORWARD, BACKWARD, SUMS):
        torch.library.opcheck(layer_norm_op, (x, weight, bias, 1e-5))
    if not need[0]:
        wider = torch.empty(2, 3, 60, device=device)[..., :48]
        torch.library.opcheck(layer_norm_out_op, (x, weight.detach(), None, 1e-5, wider))


def test_compile(device, launched):
    layer = nn.LayerNorm(48, device=device)
    x = torch.randn(4, 48, device=device, requires_grad=True)
    with launched(FORWARD, BACKWARD, SUMS):
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        (dx,) = torch.autograd.grad(compiled(x).pow(3).sum(), x)
    (expected,) = torch.autograd.grad(layer(x).pow(3).sum(), x)
    torch.testing.assert_close(dx, expected)


def test_layer():
    layer = nn.LayerNorm(6, dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (6,)))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in nn.LayerNorm(6, bias=False).named_parameters()] == ["weight"]
    assert repr(layer) == "LayerNorm(6, eps=1e-05, weight=True, bias=True)"
    layer.load_state_dict(torch.nn.LayerNorm(6, dtype=torch.float64).state_dict())


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "layer_norm: x has dtype torch.int64; use a floating-point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
        ({"weight": torch.ones(2)}, ValueError, r"weight has shape \[2\]; x needs \[3\]"),
        ({"bias": torch.ones(3).long()}, TypeError, "bias has dtype torch.int64"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias is on meta, x on cpu"),
        ({"out": torch.ones(2, 4)}, ValueError, r"out has shape \[2, 4\], x \[2, 3\]"),
        ({"out": X.clone(), "bias": torch.ones(3, requires_grad=True)}, RuntimeError, "cannot record gradients"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**{"x": X, **arguments})
