from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import add_rms_norm, dispatch, nn, rms_norm

FORWARD, BACKWARD, SUMS = "rms_norm_forward", "rms_norm_backward", "rms_norm_weight_sums"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def laid_out(layout, rows, h, dtype, device, scale, generator):
    """A tensor [..., h] of normal numbers in one of the layouts that models hand over."""

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    if layout == "sequence slice":
        return normal(2, rows + 1, h)[:, 1:]
    if layout == "packed heads":
        return normal(rows, 3, 2 * h)[:, 1:, h:]
    if layout == "transposed":
        return normal(h, rows).T
    if layout == "expanded":
        return normal(rows, 1, h).expand(rows, 2, h)
    if layout == "four strides":
        return normal(2, rows + 1, 3, 2 * h).transpose(0, 2)[:, 1:, :, :h]
    return normal(rows, h)


LAYOUTS = ["contiguous", "sequence slice", "packed heads", "transposed", "expanded", "four strides"]


def plain(x, weight, eps, offset):
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight + offset, eps)


def both(function, x, weight, dy, eps, offset):
    leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
    y = function(leaves[0], leaves[1] if weight is not None else None, eps, offset)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def judge(exact_enough, launched, x, weight, dy, eps, offset, kernels=None):
    if kernels is None:
        kernels = (FORWARD, BACKWARD, SUMS) if weight is not None else (FORWARD, BACKWARD)
    with launched(*kernels):
        actual = both(lambda x, w, eps, offset: rms_norm(x, w, eps, offset=offset), x, weight, dy, eps, offset)
    eager = both(plain, x, weight, dy, eps, offset)
    exact = both(plain, x.double(), None if weight is None else weight.double(), dy.double(), eps, offset)
    for name, *three in zip(("y", "dx", "dweight"), actual, eager, exact, strict=False):
        assert three[0].dtype == x.dtype
        exact_enough(name, *three)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 24), h=st.integers(1, 600), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
    has_weight=st.booleans(), offset=st.sampled_from([0.0, 1.0]), eps=st.sampled_from([1e-6, 1e-5]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(
    rows=3, h=1, layout="contiguous", dtype=torch.float32, has_weight=True, offset=0.0, eps=1e-6, scale=1.0, seed=0,
)  # fmt: skip
@example(
    rows=3, h=2, layout="contiguous", dtype=torch.bfloat16, has_weight=True, offset=1.0, eps=1e-6, scale=1.0, seed=0,
)  # fmt: skip
@example(
    rows=20, h=128, layout="packed heads", dtype=torch.bfloat16, has_weight=True, offset=0.0, eps=1e-6, scale=1.0,
    seed=1,
)  # fmt: skip
def test_exact(device, exact_enough, launched, rows, h, layout, dtype, has_weight, offset, eps, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = laid_out(layout, rows, h, dtype, device, scale, generator)
    weight = torch.randn(h, generator=generator).to(device, dtype) if has_weight else None
    dy = torch.randn(x.shape, generator=generator).to(device, dtype)
    judge(exact_enough, launched, x, weight, dy, eps, offset if has_weight else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [64, 1000])
def test_rows_longer_than_a_block(device, exact_enough, launched, monkeypatch, dtype, h):
    from ft_kernels.ops.rms_norm import tilings

    monkeypatch.setattr(tilings, "MAX_BLOCK", 32)
    generator = torch.Generator().manual_seed(h)
    x, dy = torch.randn(2, 7, h, generator=generator).to(device, dtype).unbind()
    judge(exact_enough, launched, x, torch.randn(h, generator=generator).to(device, dtype), dy, 1e-6, 1.0)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15, 3e38])
def test_extreme_values(device, exact_enough, launched, value):
    x = torch.full((4, 96), value, device=device)
    x[::2, ::3] *= -0.5
    judge(exact_enough, launched, x, torch.ones(96, device=device), torch.ones_like(x).cumsum(-1), 1e-6, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_exact_too(exact_enough, launched, monkeypatch, dtype):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    generator = torch.Generator().manual_seed(4)
    x, dy = torch.randn(2, 256, 300, generator=generator).to(dtype).unbind()
    judge(exact_enough, launched, x, torch.randn(300, generator=generator).to(dtype), dy, 1e-6, 1.0, kernels=())


def test_weight_of_another_dtype(device, launched):
    x = torch.randn(5, 40, device=device).half()
    weight = torch.randn(40, device=device, requires_grad=True)
    with launched(FORWARD, BACKWARD, SUMS):
        y = rms_norm(x, weight)
        y.sum().backward()
    assert y.dtype == torch.float16
    assert weight.grad.dtype == torch.float32
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(weight.grad.double(), exact.sum(0), rtol=1e-5, atol=1e-5)


def test_frozen_weight_has_no_gradient(device, launched):
    x = torch.randn(5, 40, device=device, requires_grad=True)
    with launched(FORWARD, BACKWARD):
        rms_norm(x, torch.ones(40, device=device)).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_empty(device, launched, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[-1], device=device, requires_grad=True)
    with launched():
        y = rms_norm(x, weight)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_farther_apart_than_32_bits(exact_enough, launched, tmp_path, device):
    if device == "cuda":
        pytest.skip("covered by test_more_than_two_to_the_31_elements")
    far = 2**30 + 6
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate(2 * (2 * far + 64))  # a hole: takes neither disk nor memory but for the pages touched
        with mmap.mmap(file.fileno(), 0) as pages:
            x = torch.frombuffer(pages, dtype=torch.float16).as_strided((3, 64), (far, 1))
            x.copy_(torch.randn(3, 64))
            judge(exact_enough, launched, x, None, torch.randn(3, 64).half(), 1e-6, 0.0)
            del x


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, launched):
    x = torch.empty(2**20 + 3, 2048, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    weight = torch.randn(2048, device=device, dtype=torch.bfloat16)
    with launched(FORWARD, BACKWARD):
        y = rms_norm(x, weight)
        (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x[-4:].detach().double().requires_grad_()
    exact = rms_norm(last, weight.double())
    (exact_dx,) = torch.autograd.grad(exact, last, y[-4:].double())
    torch.testing.assert_close(y[-4:].double(), exact, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(dx[-4:].double(), exact_dx, rtol=2**-8, atol=1e-4)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck_of_the_reference(offset):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, offset=offset), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, offset=offset), (x, weight))


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_opcheck(device, launched, need):
    from ft_kernels.ops.rms_norm.autograd import rms_norm_op

    x = torch.randn(2, 3, 48, device=device, requires_grad=need[0])
    weight = torch.randn(48, device=device, requires_grad=need[1])
    with launched(*((FORWARD, BACKWARD, SUMS) if need[1] else (FORWARD, BACKWARD))):
        torch.library.opcheck(rms_norm_op, (x, weight, 1e-6, 0.0))
        torch.library.opcheck(rms_norm_op, (x.detach().requires_grad_(), None, 1e-6, 0.0))


def test_compile(device, launched):
    layer = nn.RMSNorm(48, offset=1.0, device=device)
    x = torch.randn(4, 48, device=device, requires_grad=True)
    with launched(FORWARD, BACKWARD, SUMS):
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        (dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(dx, expected)


def test_layer():
    layer = nn.RMSNorm(6, offset=1.0, dtype=torch.float64)
    assert torch.equal(layer.weight, torch.zeros(6, dtype=torch.float64))
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.rms_norm(x, (6,), eps=1e-6))
    bare = nn.RMSNorm(6, weight=False)
    assert list(bare.parameters()) == []
    torch.testing.assert_close(bare(x), layer(x))
    assert repr(layer) == "RMSNorm(6, eps=1e-06, offset=1.0, weight=True)"


def added(function, x, residual, weight, dy, dtotal, eps, offset):
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight) if t is not None]
    y, total = function(leaves[0], leaves[1], leaves[2] if weight is not None else None, eps, offset)
    grads = torch.autograd.grad([y, total], leaves, [dy.to(y.dtype), dtotal.to(y.dtype)])
    return [y, total, *grads]


def plain_sum(x, residual, weight, eps, offset):
    total = x + residual
    return plain(total, weight, eps, offset), total


@settings(max_examples=12)
@given(
    rows=st.integers(1, 8), h=st.integers(1, 200), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
    has_weight=st.booleans(), offset=st.sampled_from([0.0, 1.0]), scale=st.sampled_from([1e-3, 1.0, 300.0]),
    long=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_residual_add(device, exact_enough, launched, rows, h, layout, dtype, has_weight, offset, scale, long, seed):
    from ft_kernels.ops.rms_norm import tilings

    generator = torch.Generator().manual_seed(seed)
    x = laid_out(layout, rows, h, dtype, device, scale, generator)
    residual, dy, dtotal = (torch.randn(x.shape, generator=generator).to(device, dtype) for _ in range(3))
    weight = torch.randn(h, generator=generator).to(device, dtype) if has_weight else None
    offset = offset if has_weight else 0.0
    arguments = (x, residual, weight, dy, dtotal, 1e-6, offset)
    with pytest.MonkeyPatch.context() as patch, launched(FORWARD, BACKWARD, *([SUMS] if has_weight else [])):
        if long:
            patch.setattr(tilings, "MAX_BLOCK", 64)
        actual = added(lambda x, r, w, eps, offset: add_rms_norm(x, r, w, eps, offset=offset), *arguments)
    eager = added(plain_sum, *arguments)
    exact = added(plain_sum, *(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
    if dtype != torch.bfloat16 or device == "cuda":
        assert torch.equal(actual[1], eager[1])
    else:  # the interpreter cuts the sum off where torch rounds it: what follows is judged from that sum on
        exact_enough("total", actual[1], eager[1], exact[1])
        double = [None if t is None else t.double() for t in (weight, dy, dtotal)]
        total = actual[1].detach().double()
        exact = added(plain_sum, total, torch.zeros_like(total), *double, 1e-6, offset)
    assert torch.equal(actual[2], actual[3])  # one gradient for both
    for name, *three in zip(("y", "total", "dx", "dresidual", "dweight"), actual, eager, exact, strict=False):
        exact_enough(name, *three)


@pytest.mark.parametrize("used", [0, 1])
def test_residual_add_with_one_output_used(device, launched, used):
    x, residual = torch.randn(2, 5, 40, device=device).requires_grad_().unbind()
    weight = torch.randn(40, device=device, requires_grad=True)
    with launched(*((FORWARD, BACKWARD, SUMS) if used == 0 else (FORWARD,))):
        outputs = add_rms_norm(x, residual, weight)
        dx, dweight = torch.autograd.grad(outputs[used].square().sum(), (x, weight), allow_unused=True)
    reference = plain_sum(x, residual, weight, 1e-6, 0.0)
    wanted, wanted_weight = torch.autograd.grad(reference[used].square().sum(), (x, weight), allow_unused=True)
    torch.testing.assert_close(dx, wanted)
    assert (dweight is None) == (wanted_weight is None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["wider row", "two strides", "transposed", "itself"])
def test_out(device, launched, dtype, layout):
    x, residual = torch.randn(2, 3, 4, 40, device=device).to(dtype).unbind()
    weight = torch.randn(40, device=device).to(dtype)
    with launched(FORWARD):
        expected, (expected_sum, total) = rms_norm(x, weight, offset=1.0), add_rms_norm(x, residual, weight)
    wide = torch.full((3, 5, 56), 7.0, device=device, dtype=dtype)
    out = {
        "wider row": wide[:, :4, :40],
        "two strides": wide.view(3, 280)[:, :200].view(3, 5, 40)[:, 1:],
        "transposed": torch.empty(40, 4, 3, device=device, dtype=dtype).permute(2, 1, 0),
        "itself": x,
    }[layout]
    plain_x = x.clone()
    with launched(FORWARD):
        assert rms_norm(x, weight, offset=1.0, out=out) is out
    assert torch.equal(out, expected)
    if layout == "wider row":
        assert (wide[:, 4] == 7).all()
        assert (wide[..., 40:] == 7).all()
    with launched(FORWARD):
        normed, sums = add_rms_norm(plain_x, residual, weight, out=out)
    assert normed is out
    assert torch.equal(out, expected_sum)
    assert torch.equal(sums, total)


def test_out_of_the_reference(monkeypatch, launched):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    x, residual, out = torch.randn(3, 2, 6).unbind()
    with launched():
        assert torch.equal(rms_norm(x, out=out), rms_norm(x))
        assert torch.equal(add_rms_norm(x, residual, out=out)[0], rms_norm(x + residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_weight", [True, False])
def test_gradient_added_in_place(device, launched, dtype, need_weight):
    from ft_kernels.ops.rms_norm import kernels

    x, dy, before = torch.randn(3, 7, 100, device=device).to(dtype).unbind()
    weight = torch.randn(100, device=device).to(dtype)
    _, rstd, _ = kernels.forward(x, weight, 1e-6, 0.0)
    apart, dweight = kernels.backward(dy, x, weight, rstd, 0.0, need_weight, before)
    wide = torch.zeros(7, 120, device=device, dtype=dtype)
    dx = wide[:, :100].copy_(before)
    with launched(BACKWARD, *([SUMS] if need_weight else [])):
        result, again = kernels.backward(dy, x, weight, rstd, 0.0, need_weight, dx, dx)
    assert result is dx
    assert torch.equal(dx, apart)
    assert torch.equal(again, dweight)
    assert not torch.equal(dx, before)
    assert not wide[:, 100:].any()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_eps_that_dominates(device, exact_enough, launched, offset):
    generator = torch.Generator().manual_seed(5)  # eps must be known better than fp32 knows it
    x, dy = (torch.randn(2, 64, 128, generator=generator) * 1e-4).to(device).unbind()
    judge(exact_enough, launched, x, torch.randn(128, generator=generator).to(device), dy, 1e-5, offset)


def test_opcheck_of_the_others(device, launched):
    from ft_kernels.ops.rms_norm import autograd

    x, residual = torch.randn(2, 4, 48, device=device).unbind()
    weight = torch.randn(48, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    with launched(FORWARD, BACKWARD, SUMS):
        torch.library.opcheck(autograd.add_rms_norm_op, (*leaves, 1e-6, 0.0))
        torch.library.opcheck(
            autograd.rms_norm_out_op, (x, weight, 1e-6, 0.0, torch.empty(4, 60, device=device)[:, :48])
        )
        torch.library.opcheck(autograd.add_rms_norm_out_op, (x, residual, weight, 1e-6, 0.0, torch.empty_like(x)))


@pytest.mark.gpu
def test_device_that_is_not_current_and_graph(device, launched):
    target = torch.device("cuda", torch.cuda.device_count() - 1)
    x, residual = torch.randn(2, 64, 4096, device=target, dtype=torch.bfloat16).unbind()
    weight = torch.randn(4096, device=target, dtype=torch.bfloat16, requires_grad=True)
    x.requires_grad_()

    def step():
        y, total = add_rms_norm(x, residual, weight)
        return [y, total, *torch.autograd.grad([y, total], [x, weight], [y.detach(), total.detach()])]

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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.long)}, TypeError, "x has dtype torch.int64; use a floating-point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x has no dimension"),
        ({"x": torch.ones(2, 3), "offset": 1.0}, ValueError, "weight is None; pass a weight"),
        ({"x": torch.ones(2, 3), "weight": torch.ones(2)}, ValueError, r"weight has shape \[2\]; x needs \[3\]"),
        ({"x": torch.ones(2, 3), "weight": torch.ones(3).long()}, TypeError, "weight has dtype torch.int64"),
        ({"x": torch.ones(2, 3), "weight": torch.ones(3, device="meta")}, ValueError, "weight is on meta, x on cpu"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**arguments)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"residual": torch.ones(3)}, ValueError, r"residual has shape \[3\], x \[2, 3\]"),
        ({"residual": X.half()}, TypeError, "residual has dtype torch.float16, x torch.float32"),
        ({"residual": X.to("meta")}, ValueError, "residual is on meta, x on cpu"),
        ({"out": torch.ones(2, 4)}, ValueError, r"out has shape \[2, 4\], x \[2, 3\]"),
        ({"out": X.half()}, TypeError, "out has dtype torch.float16, x torch.float32; use one dtype"),
        ({"out": torch.ones(3).expand(2, 3)}, ValueError, "out repeats elements"),
        (
            {"out": torch.ones(2, 3), "weight": torch.ones(3, requires_grad=True)},
            RuntimeError,
            "cannot record gradients",
        ),
    ],
)
def test_bad_arguments_of_the_residual_add(arguments, error, message):
    with pytest.raises(error, match=message):
        add_rms_norm(**{"x": X, "residual": X, **arguments})
