from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ft_kernels as ft
from ft_kernels import dispatch
from ft_kernels.functional import lora as functional
from ft_kernels.functional.lora import Fp8Weight, Int8Weight, NF4Weight, lora_linear, lora_qkv, widen
from ft_kernels.functional.lora_mlp import lora_mlp
from ft_kernels.nn.lora import LoRALinear
from ft_kernels.ops.lora import reference, weight_side
from ft_kernels.ops.lora.autograd import lora_linear_op, lora_row_norms_op
from ft_kernels.ops.lora_mlp.autograd import lora_mlp_backward_op, lora_mlp_op

MLP = importlib.import_module("ft_kernels.functional.lora_mlp")  # the package has the function by this name
KERNELS = ("lora_pack", "lora_rows", "lora_join", "lora_a_gradient", "lora_b_gradient")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# PEFT keeps adapters of 16-bit models in fp32 by default.
PAIRS = [(t, t) for t in DTYPES] + [(t, torch.float32) for t in DTYPES[:2]]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Widened from the first row on."""
    monkeypatch.setattr(weight_side, "SMALL", 0)


class Problem:
    """A frozen weight of one or several projections, their adapters and an input, of about unit scale."""

    def __init__(self, device, rows, k, sizes, ranks, dtype, adapter_dtype, *, seed=0, bias=False, magnitude=False):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=dtype, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        self.x, self.dy = normal(rows, k), normal(rows, sum(sizes))
        self.weights = [normal(n, k, scale=k**-0.5) for n in sizes]
        self.a = [None if r is None else normal(r, k, dtype=adapter_dtype, scale=k**-0.5) for r in ranks]
        self.b = [
            None if r is None else normal(n, r, dtype=adapter_dtype, scale=r**-0.5)
            for n, r in zip(sizes, ranks, strict=True)
        ]
        self.bias = normal(sum(sizes)) if bias else None
        self.magnitude = [
            None if r is None or not magnitude else normal(n).abs() + 0.5 for n, r in zip(sizes, ranks, strict=True)
        ]
        self.sizes = sizes

    def cast(self, dtype):
        """The same numbers in another dtype."""
        other = object.__new__(Problem)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [v.to(dtype) if isinstance(v, torch.Tensor) else v for v in value]
            setattr(other, name, value.to(dtype) if isinstance(value, torch.Tensor) else value)
        return other

    def run(self, compute, *, need_x=True):
        """The output and the gradients of x, all a, all b, bias and all magnitudes."""
        every = [self.x if need_x else None, *self.a, *self.b, self.bias, *self.magnitude]
        leaves = [None if t is None else t.detach().requires_grad_() for t in every]
        count = len(self.a)
        x, a, b = leaves[0], leaves[1 : count + 1], leaves[count + 1 : 2 * count + 1]
        bias, magnitude = leaves[2 * count + 1], leaves[2 * count + 2 :]
        y = compute(self.x if x is None else x, a, b, bias, magnitude)
        y = torch.cat(y, -1) if isinstance(y, tuple) else y
        kinds = [[x], a, b, [bias], magnitude]
        kinds = [[t for t in kind if t is not None] for kind in kinds]
        grads = list(torch.autograd.grad(y, [t for kind in kinds for t in kind], self.dy.to(y.dtype)))
        return [y, *(torch.cat([grads.pop(0).flatten() for _ in kind]) for kind in kinds if kind)]


def plain(problem, scaling, weight=None, apart=False):
    """What PEFT computes: the updates added to the base's output, which is one product or one a projection."""
    weight = torch.cat(problem.weights) if weight is None else weight

    def compute(x, a, b, bias, magnitude):
        shifts = [None] * len(a) if bias is None else bias.split(problem.sizes)
        if apart:
            base = torch.cat([F.linear(x, w, shift) for w, shift in zip(problem.weights, shifts, strict=True)], -1)
        else:
            base = F.linear(x, weight, bias)
        outputs = list(base.split(problem.sizes, -1))
        for i, (part, down, up, vector, s) in enumerate(zip(problem.weights, a, b, magnitude, scaling, strict=True)):
            if down is None:
                continue
            down, up = down.to(x.dtype), up.to(x.dtype)
            update = F.linear(F.linear(x, down), up)
            if vector is None:
                outputs[i] = outputs[i] + update * s
            else:
                norm = torch.linalg.norm(part + s * (up @ down).detach(), dim=1).to(part.dtype)
                factor = (vector.to(x.dtype) / norm).view(1, -1)
                unshifted = outputs[i] if shifts[i] is None else outputs[i] - shifts[i]
                outputs[i] = outputs[i] + (factor - 1) * unshifted + factor * update * s
        return torch.cat(outputs, -1)

    return compute


def with_gaps(weight):
    """The same numbers, with memory between the rows."""
    return F.pad(weight, (0, 16))[:, : weight.shape[1]]


def in_another_order(problem, scaling, seed):
    """What PEFT computes with features shuffled: another order of each sum, another sample of eager's error in fp32.

    torch takes other kernels for other memory layouts, so these change too.
    """
    generator = torch.Generator().manual_seed(seed)
    ins = torch.randperm(problem.x.shape[1], generator=generator).to(problem.x.device)
    outs = [torch.randperm(n, generator=generator).to(ins) for n in problem.sizes]
    starts = [sum(problem.sizes[:i]) for i in range(len(outs))]
    every = torch.cat([start + order for start, order in zip(starts, outs, strict=True)])
    other = problem.cast(problem.x.dtype)
    other.weights = [w[order][:, ins] for w, order in zip(problem.weights, outs, strict=True)]
    if seed % 4 > 1:
        other.weights = [with_gaps(w) for w in other.weights]
    plainly = plain(other, scaling, with_gaps(torch.cat(other.weights)) if seed % 4 > 1 else None, seed % 2 == 0)

    def compute(x, a, b, bias, magnitude):
        a = [None if t is None else t[:, ins] for t in a]
        b, magnitude = ([None if t is None else t[o] for t, o in zip(ts, outs, strict=True)] for ts in (b, magnitude))
        return plainly(x[:, ins], a, b, None if bias is None else bias[every], magnitude)[:, every.argsort()]

    return compute


def ours(problem, weight, scaling):

    def compute(x, a, b, bias, magnitude):
        return lora_qkv(
            x, weight, a, b, scaling=scaling, sizes=problem.sizes, bias=bias, magnitude=magnitude
        )  # fmt: skip

    return compute


def formed(problem, form):
    """The weights in one of the forms that the operations take, and as the tensor that eager torch gets."""
    rank = sum(t.shape[0] for t in problem.a if t is not None)
    if form == "wide":
        wide = widen(problem.weights, rank)
        return wide, wide.weight
    whole = torch.cat(problem.weights)
    return (whole if form == "one" else problem.weights), whole


def judge(exact_enough, problem, form, scaling, **options):
    weight, same_weight = formed(problem, form)
    actual = problem.run(ours(problem, weight, scaling), **options)
    same = problem.cast(problem.x.dtype)
    eager = [same.run(plain(same, scaling, same_weight), **options)]
    for seed in range(4 if problem.x.dtype == torch.float32 else 0):
        eager.append(same.run(in_another_order(same, scaling, seed), **options))
    exact = problem.cast(torch.float64)
    exact = exact.run(plain(exact, scaling), **options)
    for i, three in enumerate(zip(actual, zip(*eager, strict=True), exact, strict=True)):
        exact_enough(f"number {i} of y, dx, da, db, dbias, dmagnitude", *three)


@settings(max_examples=6)
@given(
    rows=st.integers(33, 150), k=st.integers(40, 200), n=st.integers(40, 150), r=st.integers(1, 40),
    pair=st.sampled_from(PAIRS), form=st.sampled_from(["wide", "one", "parts"]), bias=st.booleans(),
    count=st.integers(1, 3), scaling=st.sampled_from([1.0, 2.0, 0.3]), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(
    rows=64, k=128, n=96, r=16, pair=PAIRS[3], form="wide", bias=False, count=3, scaling=2.0, seed=0
)  # fmt: skip
@example(rows=64, k=136, n=96, r=70, pair=PAIRS[1], form="wide", bias=True, count=2, scaling=1.0, seed=1)
def test_exact(device, exact_enough, launched, rows, k, n, r, pair, form, bias, count, scaling, seed):
    sizes, ranks = [n, 40, 56][:count], [r, 8, 5][:count]
    problem = Problem(device, rows, k, sizes, ranks, *pair, seed=seed, bias=bias)
    factors = [scaling, 1.5, 0.7][:count]
    # Sums of fp32 products are torch's own, and so is what surrounds them.
    kernels = KERNELS if pair[0] != torch.float32 else ()
    with launched(*kernels):
        judge(exact_enough, problem, form, factors)


@pytest.mark.parametrize("pair", [PAIRS[1], PAIRS[2], PAIRS[3]], ids=str)
@pytest.mark.parametrize("form", ["wide", "parts"])
def test_magnitude_exact(device, exact_enough, pair, form):
    problem = Problem(device, 150, 90, [200, 40], [8, None], *pair, bias=True, magnitude=True)
    judge(exact_enough, problem, form, [0.7, 1.0])


@pytest.mark.parametrize("ranks", [[3, None, 5], [None, 6, None], [140, 2, 2]], ids=str)
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[4]], ids=str)
def test_some_projections_without_adapters_and_large_ranks(device, exact_enough, pair, ranks):
    problem = Problem(device, 40, 72, [40, 24, 16], ranks, *pair)
    judge(exact_enough, problem, "wide", [2.0, 1.0, 0.5])
    judge(exact_enough, problem, "parts", [2.0, 1.0, 0.5], need_x=False)


def test_without_any_adapter(device, launched):
    x, weight = torch.randn(3, 8, device=device, requires_grad=True), torch.randn(6, 8, device=device)
    with launched():
        nothing = lora_qkv(x[:0], widen(weight, 0), [None], [None])[0].sum()
        assert not torch.autograd.grad(nothing, x)[0].any()
        q, k = lora_qkv(x, widen(weight, 0), [None, None], [None, None], sizes=[4, 2])
        torch.testing.assert_close(torch.cat([q, k], -1), F.linear(x, weight))
        (dx,) = torch.autograd.grad(q.sum() + k.sum(), x)
    torch.testing.assert_close(dx, weight.sum(0).expand(3, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(device, exact_enough, monkeypatch, dtype):
    """The kernels', torch's and float64's masks are the same for a seed."""
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=device)
    monkeypatch.setattr(functional, "draw_seed", lambda x, dropout, count=1: seed if dropout else None)
    problem = Problem(device, 70, 136, [40, 24], [8, 12], dtype, dtype)
    starts, scaling = [0, 40], [2.0, 0.7]

    def by_terms(given):
        weight = torch.cat(given.weights)
        return lambda x, a, b, *_: reference.lora_linear(x, weight, a, b, starts, scaling, None, 0.3, seed)

    weight, _ = formed(problem, "wide")
    actual = problem.run(lambda x, a, b, *_: lora_qkv(x, weight, a, b, scaling=scaling, dropout=0.3))
    exact = problem.cast(torch.float64)
    exact = exact.run(by_terms(exact))
    for what, *three in zip(("y", "dx", "da", "db"), actual, problem.run(by_terms(problem)), exact, strict=True):
        exact_enough(what, *three)


def test_what_is_dropped(device):
    masks = [reference.keep_mask(torch.tensor([7], device=device), 200, 300, i, 0.25) for i in range(3)]
    for i, mask in enumerate(masks):
        assert abs(mask.double().mean().item() - 0.75) < 0.01
        assert abs((mask == masks[i - 1]).double().mean().item() - 0.625) < 0.01
    x = torch.randn(40, 32, device=device)
    weight, a, b = (torch.randn(shape, device=device) for shape in ((24, 32), (4, 32), (24, 4)))

    def output(seed, **settings):
        torch.manual_seed(seed)
        return lora_linear(x, weight, a, b, dropout=0.5, **settings)

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    torch.testing.assert_close(output(1, training=False), lora_linear(x, weight, a, b))
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda a: output(1).sum() * 0 + lora_linear(x, weight, a, b, dropout=0.5).sum(),
        a.requires_grad_(),
        use_reentrant=False,
    )
    (once,) = torch.autograd.grad(checkpointed, a)
    assert torch.isfinite(once).all()


def peft_layer(problem, dtype, **settings):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(problem.x.shape[1], problem.sizes[0], device=problem.x.device))
    config = peft.LoraConfig(r=problem.a[0].shape[0], lora_alpha=12, target_modules=["0"], **settings)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(problem.weights[0])
        layer.base_layer.bias.copy_(problem.bias)
        layer.lora_A.default.weight.copy_(problem.a[0])
        layer.lora_B.default.weight.copy_(problem.b[0])
        if settings.get("use_dora"):
            layer.lora_magnitude_vector.default.weight.copy_(problem.magnitude[0])
    layer.to(dtype).base_layer.bias.requires_grad_()
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings_", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_as_peft(device, exact_enough, dtype, settings_):
    problem = Problem(device, 64, 96, [80], [8], dtype, dtype, bias=True, magnitude="use_dora" in settings_)

    def by_peft(given, dtype):
        layer = peft_layer(given, dtype, **settings_)
        x = given.x.detach().requires_grad_()
        y = layer(x)
        leaves = [x, layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.bias]
        if problem.magnitude[0] is not None:
            leaves.append(layer.lora_magnitude_vector.default.weight)
        grads = torch.autograd.grad(y, leaves, given.dy)
        return [y, *(g if i == 0 else g.flatten() for i, g in enumerate(grads))], layer.scaling["default"]

    eager, scaling = by_peft(problem, dtype)
    exact, _ = by_peft(problem.cast(torch.float64), torch.float64)
    weight = widen(problem.weights, 8)
    actual = problem.run(
        lambda x, a, b, bias, magnitude: lora_linear(
            x, weight, a[0], b[0], scaling=scaling, bias=bias, magnitude=magnitude[0]
        )
    )
    actual[1] = actual[1].view_as(exact[1])
    for what, *three in zip(("y", "dx", "da", "db", "dbias", "dmagnitude"), actual, eager, exact, strict=False):
        if dtype == torch.float32:  # where small sums of torch's own differ by more than a tenth with the memory layout
            torch.testing.assert_close(three[0].double(), three[2], rtol=1e-4, atol=1e-4)
        else:
            exact_enough(what, *three)


def gated(problem, scaling, kind, packed, sizes, joined=False):
    """The multilayer perceptron as PEFT and transformers compute it. Its weights are gate, up and down.

    joined: gate and up are one product, whose kernel adds up in another order.
    """

    def compute(x, a, b, *_):
        gate, up, down = problem.weights

        def update(x, i):
            return F.linear(F.linear(x, a[i].to(x.dtype)), b[i].to(x.dtype)) * scaling[i]

        if packed:
            g, u = (F.linear(x, torch.cat([gate, up])) + update(x, 0)).chunk(2, -1)
        else:
            products = (
                F.linear(x, torch.cat([gate, up])).chunk(2, -1) if joined else (F.linear(x, w) for w in (gate, up))
            )
            g, u = (product + update(x, i) for i, product in enumerate(products))
        active = F.silu(g) if kind == "silu" else F.gelu(g, approximate="tanh" if kind == "gelu_tanh" else "none")
        h = active * u
        return F.linear(h, down) + update(h, len(a) - 1)

    return compute


class Perceptron(Problem):
    def __init__(self, device, rows, k, i, n, ranks, dtype, adapter_dtype):
        packed = len(ranks) == 2
        super().__init__(device, rows, k, [i, i, n], [None] * 3, dtype, adapter_dtype, seed=5)
        other = Problem(device, rows, i, [n], ranks[-1:], dtype, adapter_dtype, seed=6)
        first = Problem(device, rows, k, [2 * i] if packed else [i, i], ranks[:-1], dtype, adapter_dtype, seed=7)
        self.weights[2], self.dy = other.weights[0], other.dy
        self.a, self.b, self.magnitude = first.a + other.a, first.b + other.b, []


@pytest.mark.parametrize(
    ("kind", "pair", "form", "ranks"),
    [
        ("silu", PAIRS[4], "wide", [8, 5, 16]),
        ("gelu", PAIRS[1], "wide", [8, 16]),
        ("gelu_tanh", PAIRS[0], "parts", [4, 20, 3]),
        ("silu", PAIRS[2], "wide", [8, 5, 6]),
        ("gelu_tanh", PAIRS[2], "parts", [8, 6]),
    ],
)  # fmt: skip
def test_mlp_exact(device, exact_enough, launched, kind, pair, form, ranks):
    problem = Perceptron(device, 70, 72, 104, 64, ranks, *pair)
    scaling = [0.7, 2.0, 1.5][: len(ranks)]
    gate_up, down = problem.weights[:2], problem.weights[2]
    if form == "wide":
        gate_up, down = widen(gate_up, sum(ranks[:-1])), widen(down, ranks[-1])
    names = {*KERNELS, "lora_middle", "lora_hidden" if form == "wide" else "glu_forward"}
    with launched(*(names if pair[0] != torch.float32 else ("glu_forward", "glu_backward"))):
        actual = problem.run(lambda x, a, b, *_: lora_mlp(x, gate_up, down, a, b, scaling=scaling, activation=kind))
    if kind == "silu":
        frozen_x = problem.run(
            lambda x, a, b, *_: lora_mlp(x, gate_up, down, a, b, scaling=scaling, activation=kind), need_x=False
        )
        for one, two in zip(frozen_x[1:], actual[2:], strict=True):
            assert (one - two).norm() < 1e-2 * two.norm()
    same, exact = problem.cast(problem.x.dtype), problem.cast(torch.float64)
    eager = [same.run(gated(same, scaling, kind, len(ranks) == 2, problem.sizes))]
    for seed in range(4 if pair[0] == torch.float32 else 0):
        # Where the products round as much as all else, one order of their sums shows but one sample of eager's error.
        generator = torch.Generator().manual_seed(seed)
        order, inner = (torch.randperm(n, generator=generator).to(device) for n in (72, 104))
        other = problem.cast(problem.x.dtype)
        other.weights = [*(w[inner][:, order] for w in same.weights[:-1]), same.weights[-1][:, inner]]
        if seed > 1:
            other.weights = [with_gaps(w) for w in other.weights]
        plainly = gated(other, scaling, kind, len(ranks) == 2, problem.sizes, joined=seed % 2 == 0)
        rows = torch.cat([inner, 104 + inner]) if len(ranks) == 2 else inner

        def shuffled(x, a, b, *rest, order=order, inner=inner, rows=rows, plainly=plainly):
            a = [*(t[:, order] for t in a[:-1]), a[-1][:, inner]]
            return plainly(x[:, order], a, [*(t[rows] for t in b[:-1]), b[-1]], *rest)

        eager.append(same.run(shuffled))
    eager = zip(*eager, strict=True)
    exact = exact.run(gated(exact, scaling, kind, len(ranks) == 2, problem.sizes))
    for what, *three in zip(("y", "dx", "da", "db"), actual, eager, exact, strict=True):
        exact_enough(what, *three)


def test_mlp_dropout_and_parts(device, monkeypatch):
    """With dropout the kernels give what torch does for the same seed; biases and magnitudes go through."""
    seed = torch.tensor([3, 4], device=device)
    monkeypatch.setattr(MLP, "draw_seed", lambda x, dropout, count=1: seed)
    problem = Perceptron(device, 40, 32, 48, 24, [4, 4, 4], torch.float16, torch.float32)
    gate_up, down = widen(problem.weights[:2], 8), widen(problem.weights[2], 4)

    def dropped(x, a, b, *_):
        return lora_mlp(x, gate_up, down, a, b, dropout=0.4)

    by_kernels = problem.run(dropped)
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    for ours_, torchs in zip(by_kernels, problem.run(dropped), strict=True):
        assert (ours_.float() - torchs.float()).norm() < 3e-3 * torchs.float().norm()
    bias = [torch.randn(48, device=device), None, torch.randn(24, device=device)]
    bias = [None if t is None else t.half() for t in bias]
    magnitude = [None, torch.rand(48, device=device) + 1, None]
    y = lora_mlp(problem.x, gate_up, down, problem.a, problem.b, bias=bias, magnitude=magnitude)
    exact = problem.cast(torch.float64)
    bias, magnitude = ([None if t is None else t.double() for t in ts] for ts in (bias, magnitude))
    same = lora_mlp(exact.x, exact.weights[:2], exact.weights[2], exact.a, exact.b, bias=bias, magnitude=magnitude)
    torch.testing.assert_close(y.double(), same, rtol=1e-2, atol=2e-2)


def test_mlp_gradients_are_made_in_place_once(device):
    problem = Perceptron(device, 8, 16, 24, 16, [2, 2, 2], torch.float32, torch.float32)
    x = problem.x.requires_grad_()
    y = lora_mlp(x, problem.weights[:2], problem.weights[2], problem.a, problem.b)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="lora_mlp: backward was called a second time"):
        y.sum().backward()


def quantized(kind, weights):
    """The weights quantized, and the numbers that they stand for."""
    if kind == "int8":
        parts = []
        for w in weights:
            scales = w.float().abs().amax(1)
            parts.append(Int8Weight((w.float() * 127 / scales[:, None]).round().to(torch.int8), scales))
        numbers = [ft.int8_dequantize(p.quantized, p.scales, w.dtype) for p, w in zip(parts, weights, strict=True)]
        return parts, numbers
    parts = [NF4Weight.quantize(w, nested=kind == "nf4 nested") for w in weights]
    numbers = [
        ft.nf4_dequantize(p.packed, p.absmax, p.shape, w.dtype, nested=p.nested)
        for p, w in zip(parts, weights, strict=True)
    ]
    return parts, numbers


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
@pytest.mark.parametrize("pair", [PAIRS[4], PAIRS[2]], ids=str)
def test_quantized_bases(device, exact_enough, kind, pair):
    problem = Problem(device, 64, 128, [64, 32], [8, 4], *pair)
    parts, problem.weights = quantized(kind, problem.weights)
    scaling = [2.0, 1.0]
    actual = problem.run(ours(problem, parts, scaling))
    eager = problem.run(plain(problem, scaling))
    exact = problem.cast(torch.float64)
    exact = exact.run(plain(exact, scaling))
    for what, *three in zip(("y", "dx", "da", "db"), actual, eager, exact, strict=True):
        exact_enough(what, *three)
    dora = lora_linear(problem.x, parts[0], problem.a[0], problem.b[0], magnitude=problem.dy[0, :64].float())
    same = lora_linear(problem.x, problem.weights[0], problem.a[0], problem.b[0], magnitude=problem.dy[0, :64].float())
    torch.testing.assert_close(dora, same, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backward", [True, False])
def test_fp8_base(device, backward):
    problem = Problem(device, 64, 128, [64, 32], [8, 4], torch.bfloat16, torch.float32, bias=True)
    parts = [Fp8Weight.quantize(w, backward=backward) for w in problem.weights]
    actual = problem.run(ours(problem, parts, [2.0, 1.0]))
    exact = problem.cast(torch.float64)
    exact = exact.run(plain(exact, [2.0, 1.0]))
    # Three bits of mantissa on both sides of the base's product; only it is so coarse.
    for what, bound, x, y in zip(("y", "dx", "da", "db"), (0.05, 0.05, 0.006, 0.006), actual, exact, strict=False):
        assert (x.double() - y).norm() < bound * y.norm(), what
    mlp = Perceptron(device, 64, 128, 64, 32, [4, 4, 4], torch.bfloat16, torch.float32)
    weights = [Fp8Weight.quantize(w, backward=backward) for w in mlp.weights]
    actual = mlp.run(lambda x, a, b, *_: lora_mlp(x, weights[:2], weights[2], a, b))
    exact = mlp.cast(torch.float64)
    exact = exact.run(gated(exact, [1.0] * 3, "silu", False, None))
    for x, y in zip(actual, exact, strict=True):
        assert (x.double() - y).norm() < 0.12 * y.norm()


def saved_bytes(compute):
    """Bytes of distinct memory saved for backward."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["wide", "nf4"])
def test_what_is_kept_for_backward(device, kind):
    m, k, n, r = 64, 64, 96, 4
    x = torch.randn(m, k, device=device).bfloat16().requires_grad_()
    a, b = torch.randn(r, k, device=device).requires_grad_(), torch.randn(n, r, device=device).requires_grad_()
    weight = torch.randn(n, k, device=device).bfloat16()
    base = widen(weight, r) if kind == "wide" else NF4Weight.quantize(weight)
    expected = 2 * m * k + 2 * m * 16 + 4 * r * (k + n)
    assert saved_bytes(lambda: lora_linear(x, base, a, b)) == expected
    # Of the perceptron: gate and up, what adapters made of x and h, and nothing else as wide as h.
    i = n
    gate_up, down = torch.cat([weight, weight]), torch.randn(k, i, device=device).bfloat16()
    if kind == "nf4":
        gate_up, down = NF4Weight.quantize(gate_up), NF4Weight.quantize(down)
    else:
        gate_up, down = widen(gate_up, 2 * r), widen(down, r)
    more = torch.randn(r, i, device=device).requires_grad_(), torch.randn(k, r, device=device).requires_grad_()
    expected = 2 * m * k + 2 * m * 2 * i + 2 * 2 * m * 16 + 4 * r * (k + n + i + k)
    assert saved_bytes(lambda: lora_mlp(x, gate_up, down, (a, a, more[0]), (b, b, more[1]))) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_buffer_as_input(device, dtype):
    """A norm wrote x into the left part of wider rows; the tail is filled, x is not copied."""
    problem = Problem(device, 40, 72, [48], [8], dtype, dtype)
    wide = widen(problem.weights, 8)
    row = torch.full((2, 20, wide.buffer.shape[1]), float("nan"), device=device, dtype=dtype)
    row[..., :72] = problem.x.view(2, 20, 72)
    arguments = (wide, problem.a[0].requires_grad_(), problem.b[0].requires_grad_())
    y = lora_linear(row, *arguments)
    plain_y = lora_linear(problem.x, *arguments)
    assert torch.equal(y.view_as(plain_y), plain_y)
    for leaf in arguments[1:]:
        (one,) = torch.autograd.grad(y, leaf, problem.dy.view_as(y), retain_graph=True)
        (two,) = torch.autograd.grad(plain_y, leaf, problem.dy, retain_graph=True)
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="gets no gradient"):
        lora_linear(row.requires_grad_(), *arguments)


def test_adapters_taking_turns_on_one_weight(device):
    """The columns beside the weight belong to whoever comes next, in backward too."""
    problem = Problem(device, 40, 72, [48], [8], torch.bfloat16, torch.float32)
    other = Problem(device, 40, 72, [48], [5], torch.bfloat16, torch.float32, seed=1)
    wide = widen(problem.weights, 8)
    alone = problem.run(lambda x, a, b, *_: lora_linear(x, wide, a[0], b[0], scaling=2.0))

    def with_another_between(x, a, b, *_):
        y = lora_linear(x, wide, a[0], b[0], scaling=2.0)
        lora_linear(x, wide, other.a[0], other.b[0])
        return y

    for one, two in zip(alone, problem.run(with_another_between), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(wide.weight, problem.weights[0])


def test_several_adapters_at_once(device, exact_enough):
    problem = Problem(device, 40, 72, [48, 48], [8, 5], torch.bfloat16, torch.bfloat16)
    problem.dy = problem.dy[:, :48]

    def both(weight):
        def compute(x, a, b, *_):
            updates = [F.linear(F.linear(x, d), u) * s for d, u, s in zip(a, b, (2.0, 0.5), strict=True)]
            return F.linear(x, weight) + updates[0] + updates[1]

        return compute

    weight = widen(problem.weights[0], 13)
    actual = problem.run(lambda x, a, b, *_: lora_linear(x, weight, a, b, scaling=[2.0, 0.5]))
    exact = problem.cast(torch.float64)
    for what, *three in zip(
        ("y", "dx", "da", "db"), actual, problem.run(both(problem.weights[0])), exact.run(both(exact.weights[0])),
        strict=True,
    ):  # fmt: skip
        exact_enough(what, *three)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_second_backward_of_the_mlp(device, dtype, hooks):
    """Is refused: it writes over gate and up. Autograd itself does not see it where hooks keep the tensors."""
    problem = Perceptron(device, 32, 40, 24, 16, [4, 4, 4], dtype, torch.float32)
    leaves = [t.detach().requires_grad_() for t in (problem.x, *problem.a, *problem.b)]
    same = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with same if hooks else contextlib.nullcontext():
        y = lora_mlp(leaves[0], problem.weights[:2], problem.weights[2], leaves[1:4], leaves[4:])
    torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="lora_mlp: backward was called a second time"):
        torch.autograd.grad(y.sum(), leaves)


def test_few_rows_are_not_widened(device, monkeypatch):
    problem = Problem(device, 3, 72, [48], [8], torch.bfloat16, torch.float32)
    wide = widen(problem.weights, 8)
    few = problem.run(lambda x, a, b, *_: lora_linear(x, wide, a[0], b[0]))
    monkeypatch.setattr(weight_side, "SMALL", 128)
    wide.buffer[:, 72:] = float("nan")
    for one, two in zip(few, problem.run(lambda x, a, b, *_: lora_linear(x, wide, a[0], b[0])), strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("layout", ["transposed", "sequence slice", "expanded gradient"])
def test_layouts(device, layout):
    problem = Problem(device, 42, 72, [48], [8], torch.bfloat16, torch.float32)
    x, dy = problem.x, problem.dy
    if layout == "transposed":
        x = x.t().contiguous().t()
        dy = dy.t().contiguous().t()
    elif layout == "sequence slice":
        x = torch.cat([x.view(2, 21, 72), x.view(2, 21, 72)], 1)[:, 21:]
    else:
        dy = dy[:1].expand(42, 48)
    problem.dy = dy.contiguous()
    wide = widen(problem.weights, 8)
    _, *expected = problem.run(lambda x, a, b, *_: lora_linear(x, wide, a[0], b[0]))
    leaves = [t.detach().requires_grad_() for t in (x, problem.a[0], problem.b[0])]
    y = lora_linear(leaves[0], wide, *leaves[1:])
    grads = torch.autograd.grad(y, leaves, dy.expand_as(y) if layout != "sequence slice" else dy.view_as(y))
    for one, two in zip(grads, expected, strict=True):
        assert torch.equal(one.flatten(), two.flatten())


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_empty(device, launched, shape, dtype):
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    a, b = torch.randn(2, 16, device=device, requires_grad=True), torch.randn(24, 2, device=device, requires_grad=True)
    down = torch.randn(16, 24, device=device, dtype=dtype)
    with launched():
        y = lora_linear(x, widen(torch.randn(24, 16, device=device, dtype=dtype), 2), a, b)
        assert y.shape == (*shape[:-1], 24)
        dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
        assert dx.shape == shape
        assert not da.any()
        assert not db.any()
        z = lora_mlp(x, torch.randn(48, 16, device=device, dtype=dtype), down, (a, a, None), (b, b, None))
        dx, da = torch.autograd.grad(z.sum(), (x, a))
        assert dx.shape == shape
        assert not da.any()


def test_neighbouring_gradients_are_not_copied(device):
    joined = torch.randn(3, 5, 12, device=device)
    parts = joined.split([4, 6, 2], -1)
    assert functional._join(parts).data_ptr() == joined.data_ptr()
    assert torch.equal(functional._join(parts), joined)
    for others in ([parts[1], parts[0]], [parts[0], parts[2]], [parts[0].contiguous(), parts[1]]):
        assert torch.equal(functional._join(others), torch.cat(others, -1))


def test_autocast(device):
    x = torch.randn(40, 32, device=device)
    weight, a, b = (torch.randn(shape, device=device) for shape in ((24, 32), (4, 32), (24, 4)))
    with pytest.raises(TypeError, match="use one dtype, or autocast"):
        lora_linear(x, weight.bfloat16(), a, b)
    with torch.autocast(device, torch.bfloat16):
        y = lora_linear(x, weight.bfloat16(), a, b)
        same = lora_linear(x, weight, a, b)
    assert y.dtype == torch.bfloat16
    assert same.dtype == torch.float32
    torch.testing.assert_close(same, F.linear(x, weight) + F.linear(F.linear(x, a), b), rtol=1e-4, atol=1e-4)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_the_reference():
    weight = torch.randn(6, 5, dtype=torch.float64)
    arguments = (double(3, 5), double(2, 5), double(6, 2), double(6))
    assert torch.autograd.gradcheck(lambda x, a, b, c: lora_linear(x, weight, a, b, bias=c, scaling=0.7), arguments)
    assert torch.autograd.gradgradcheck(lambda x, a, b, c: lora_linear(x, weight, a, b, bias=c), arguments)
    # The norm is taken as a constant, so that only the magnitude's gradient is the function's own.
    x, a, b = (t.detach() for t in arguments[:3])
    assert torch.autograd.gradcheck(lambda m: lora_linear(x, weight, a, b, magnitude=m), double(6))
    down = torch.randn(4, 3, dtype=torch.float64)
    a, b = [double(2, 5), double(1, 5), double(2, 3)], [double(3, 2), double(3, 1), double(4, 2)]
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert torch.autograd.gradcheck(
            lambda x, *rest, kind=kind: lora_mlp(x, weight, down, rest[:3], rest[3:], activation=kind),
            (arguments[0], *a, *b),
        )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("form", ["plain", "wide", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leading_dimensions(device, shape, form, dtype):
    """None, some, or empty ones; with a bias that is trained, whose gradient is summed over them."""
    problem = Problem(device, 1, 64, [24], [4], dtype, dtype)
    weight = problem.weights[0]
    base = {"plain": weight, "wide": widen(weight, 4), "nf4": NF4Weight.quantize(weight)}[form]
    if form == "nf4":
        weight = ft.nf4_dequantize(base.packed, base.absmax, base.shape, dtype, nested=base.nested)
    generator = torch.Generator().manual_seed(4)
    x, bias, dy = (torch.randn(n, generator=generator).to(device, dtype) for n in ((*shape, 64), (24,), (*shape, 24)))
    leaves = [t.detach().requires_grad_() for t in (x, problem.a[0], problem.b[0], bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = lora_linear(leaves[0], base, leaves[1], leaves[2], scaling=2.0, bias=leaves[3])
    wide = F.linear(exact[0], weight.double(), exact[3]) + 2 * exact[0] @ exact[1].t() @ exact[2].t()
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    expected = [wide, *torch.autograd.grad(wide, exact, dy.double())]
    for actual, number in zip(results, expected, strict=True):
        assert actual.shape == number.shape
        bound = 2e-2 if dtype == torch.bfloat16 else 1e-5  # some roundings, one after the other
        assert (actual.double() - number).norm() <= bound * number.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(device, dtype):
    problem = Problem(device, 32, 40, [24, 16], [4, 3], dtype, torch.float32)
    a, b = ([t.requires_grad_() for t in ts] for ts in (problem.a, problem.b))
    x = problem.x.requires_grad_()
    form = (problem.weights, "plain", 40, [24, 16], [])
    seed = torch.tensor([9], device=device)
    # In 16 bits the kernels run, for which the quick checks do.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks[:3] if dtype == torch.bfloat16 else checks
    linear = (x, *form, a, b, [0, 24], [2.0, 1.0], None, 0.2, seed)
    torch.library.opcheck(lora_linear_op, linear, test_utils=checks)
    wide = widen(problem.weights, 7)
    form = ([wide.buffer], "wide", 40, [24, 16], [])
    plain_adapters = ([t.detach() for t in a], [t.detach() for t in b], [0, 24], [1.0, 1.0])
    torch.library.opcheck(lora_row_norms_op, (*form, *plain_adapters, dtype), test_utils=checks)
    mlp = Perceptron(device, 32, 40, 24, 16, [4, 4, 4], dtype, torch.float32)
    a, b = ([t.requires_grad_() for t in ts] for ts in (mlp.a, mlp.b))
    first = ([*mlp.weights[:2]], "plain", 40, [24, 24], [], a[:2], b[:2], [0, 24], [1.0, 1.0])
    second = ([mlp.weights[2]], "plain", 24, [16], [], a[2:], b[2:], [0], [1.0])
    seed = torch.tensor([9, 10], device=device)
    # The last check takes gate and up for results, which no caller sees and backward writes over; see test_compile.
    arguments = (*first, *second, 0, 0.2, seed)
    torch.library.opcheck(lora_mlp_op, (mlp.x.requires_grad_(), *arguments), test_utils=checks[:3])
    _, both, tail, hidden_tail = (t.detach() for t in lora_mlp_op(mlp.x, *arguments))
    frozen = [[t.detach() for t in v] if isinstance(v, list) and v and torch.is_tensor(v[0]) else v for v in arguments]
    given = (mlp.dy, mlp.x.detach(), both, tail, hidden_tail, *frozen, True)
    torch.library.opcheck(lora_mlp_backward_op, given, test_utils=checks)


def test_opcheck_of_a_wide_weight(device):
    """As it is used, from 128 rows on: the operation writes into the columns that the weight has for that.

    A schema that said so could have no autograd formula, see docs/decisions/0010: ``test_schema`` finds the columns
    changed, and nothing else does.
    """
    problem = Problem(device, 130, 40, [24, 16], [4, 3], torch.bfloat16, torch.float32)
    a, b = ([t.requires_grad_() for t in ts] for ts in (problem.a, problem.b))
    wide = widen(problem.weights, 7)
    wide.buffer[:, 40:] = 0
    weight = wide.weight.clone()
    form = ([wide.buffer], "wide", 40, [24, 16], [])
    given = (problem.x.requires_grad_(), *form, a, b, [0, 24], [1.0, 1.0], problem.dy[0], 0.0, None)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(lora_linear_op, given, test_utils=checks)
    with pytest.raises(Exception, match=r"weight.* mutat"):
        torch.library.opcheck(lora_linear_op, given, test_utils="test_schema")
    lora_linear_op(*given)
    assert torch.equal(wide.weight, weight)
    assert wide.buffer[:, 40:].any()


@pytest.mark.parametrize(("rows", "dtype"), [(32, torch.bfloat16), (130, torch.bfloat16), (32, torch.float32)])
def test_compile(device, rows, dtype):
    """From 128 rows on the operations write into the columns beside a wide weight, which no graph knows."""
    problem = Perceptron(device, rows, 40, 24, 16, [4, 4, 4], dtype, torch.float32)
    qkv = Problem(device, rows, 16, [24, 16], [4, 3], dtype, torch.float32)
    wide, down, last = widen(problem.weights[:2], 8), widen(problem.weights[2], 4), widen(qkv.weights, 7)

    def block(x, *adapters):
        a, b = adapters[:3], adapters[3:6]
        h = lora_mlp(x, wide, down, a, b, scaling=0.5)
        q, k = lora_qkv(h, last, adapters[6:8], adapters[8:], dropout=0.0, magnitude=[None, qkv.dy[0, :16].float()])
        return torch.cat([q * 2, k.sin()], -1)

    leaves = [t.detach().requires_grad_() for t in (problem.x, *problem.a, *problem.b, *qkv.a, *qkv.b)]
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for function in (compiled, block):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, qkv.dy)])
    # The compiler rounds less often on the way; a few roundings of 16 bits are what may differ.
    for one, two in zip(*results, strict=True):
        assert (one - two).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * two.norm()


def test_layer(device, tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24, device=device)
    layer = LoRALinear.from_linear(linear, 4, alpha=8, weight_decomposed=True, rank_stabilized=True)
    assert repr(layer) == "LoRALinear(40, 24, rank=4, scaling=4)"
    x = torch.randn(2, 5, 40, device=device)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b", "magnitude"}
    assert set(layer.state_dict()) == {"weight", "bias", "lora_a", "lora_b", "magnitude"}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    target = torch.randn(2, 5, 24, device=device)
    losses = []
    for _ in range(5):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = LoRALinear(40, 24, 4, alpha=8, weight_decomposed=True, rank_stabilized=True, bias=True, device=device)
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    for same in (other, copy.deepcopy(layer)):
        torch.testing.assert_close(same(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), rtol=5e-2, atol=5e-2)
    del other.state_dict()["weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "weight"})


@pytest.mark.parametrize("shape", [(1, 8), (6, 1), (8,), (5, 8), (1, 6, 8)])
def test_a_layer_loads_a_weight_of_its_own_shape_alone(shape):
    layer = LoRALinear(8, 6, 2)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .* is torch.Size\(\[6, 8\]\)"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(shape)})
    assert torch.equal(layer.weight, before)
    nested = torch.nn.Sequential(layer)
    assert set(nested.state_dict()) == {"0.weight", "0.lora_a", "0.lora_b"}
    nested.load_state_dict({**nested.state_dict(), "0.weight": before * 2})
    assert torch.equal(layer.weight, before * 2)
    missing = nested.load_state_dict({}, strict=False).missing_keys
    assert set(missing) == {"0.weight", "0.lora_a", "0.lora_b"}


def test_a_layer_in_data_parallel(tmp_path):
    """Nothing frozen is sent at each forward, and the adapters get their gradients."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        layer = LoRALinear(40, 24, 4, bias=True)
        model = torch.nn.parallel.DistributedDataParallel(layer)
        assert not list(model.modules_buffers)
        model(torch.randn(2, 40)).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in layer.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, -1])
def test_a_layer_needs_a_rank(rank):
    with pytest.raises(ValueError, match=f"LoRALinear: rank={rank}; allowed is 1 or more"):
        LoRALinear(8, 6, rank)


WEIGHT, DOWN, UP = torch.ones(6, 4), torch.ones(2, 4), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(2, 4).long()}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(2, 5)}, ValueError, r"x has shape \[2, 5\]; the weight needs \[..., 4\]"),
        ({"weight": WEIGHT.clone().requires_grad_()}, ValueError, "requires a gradient, which is not computed here"),
        ({"weight": torch.ones(6)}, ValueError, r"each part needs \[N, K\]"),
        ({"weight": WEIGHT.long()}, TypeError, "use one floating-point dtype"),
        ({"weight": "W"}, TypeError, r"the base weight is made of \['str'\]"),
        ({"weight": widen(WEIGHT, 1), "a": torch.ones(99, 4), "b": torch.ones(6, 99)}, ValueError, "room for 60 ranks"),
        ({"a": torch.ones(3, 4)}, ValueError, r"a needs \[r, K\] and b \[6, r\]"),
        ({"b": torch.ones(5, 2)}, ValueError, r"b \[5, 2\] do not fit"),
        ({"a": DOWN.double()}, TypeError, "use one floating-point dtype for all"),
        ({"a": torch.ones(2, 3)}, ValueError, r"the weight needs \[r, 4\]"),
        ({"a": [DOWN, DOWN]}, ValueError, "2 a and 1 b"),
        ({"scaling": [1.0, 2.0]}, ValueError, "scaling has 2 numbers for 1 adapters"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\]; the weight needs \[6\]"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0; allowed is 0 to below 1"),
        ({"magnitude": torch.ones(4)}, ValueError, r"magnitude \[4\] on cpu does not fit; it needs \[6\]"),
        ({"a": [DOWN, DOWN], "b": [UP, UP], "magnitude": torch.ones(6)}, ValueError, "magnitude is for one adapter"),
        ({"x": torch.ones(2, 4, device="meta")}, ValueError, "tensors are on .*use one device"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        lora_linear(**{"x": torch.ones(2, 4), "weight": WEIGHT, "a": DOWN, "b": UP, **arguments})


FOUR_BIT, NESTED = NF4Weight.quantize(torch.ones(64, 64), nested=False), NF4Weight.quantize(torch.ones(64, 64))
EIGHT_BIT, IN_FP8 = Int8Weight(WEIGHT.char(), torch.ones(6)), Fp8Weight.quantize(WEIGHT)


@pytest.mark.parametrize(
    ("weight", "changed", "error", "message"),
    [
        (FOUR_BIT, {"packed": FOUR_BIT.packed[:100]}, ValueError, r"packed has 100 bytes; shape \[64, 64\] needs 2048"),
        (FOUR_BIT, {"absmax": FOUR_BIT.absmax[:3]}, ValueError, "absmax has 3 elements, expected 64"),
        (FOUR_BIT, {"absmax": FOUR_BIT.absmax.half()}, TypeError, "absmax has dtype torch.float16, expected"),
        (FOUR_BIT, {"blocksize": 32}, ValueError, "absmax has 64 elements, expected 128"),
        (FOUR_BIT, {"blocksize": 48}, ValueError, "blocksize=48; allowed are 32, 64"),
        (FOUR_BIT, {"shape": (64 * 64,)}, ValueError, "a weight has two sizes"),
        (NESTED, {"nested": None}, TypeError, "uint8 scales need nested"),
        (NESTED, {"nested": dataclasses.replace(NESTED.nested, blocksize=3)}, ValueError, "allowed are powers of two"),
        (NESTED, {"nested": dataclasses.replace(NESTED.nested, code=torch.ones(9))}, ValueError, "code has 9 elements"),
        (EIGHT_BIT, {"quantized": WEIGHT.byte()}, TypeError, "quantized has dtype torch.uint8, expected torch.int8"),
        (EIGHT_BIT, {"quantized": WEIGHT.char()[None]}, ValueError, r"has shape \[1, 6, 4\]; it needs \[N, K\]"),
        (EIGHT_BIT, {"scales": torch.ones(4)}, ValueError, "there is one scale for each row"),
        (EIGHT_BIT, {"scales": torch.ones(6).half()}, TypeError, "scales have dtype torch.float16, expected"),
        (IN_FP8, {"numbers": WEIGHT}, TypeError, "numbers and scales have dtypes torch.float32"),
        (IN_FP8, {"numbers": WEIGHT.to(torch.float8_e5m2)}, TypeError, "expected torch.float8_e4m3fn"),
        (IN_FP8, {"transposed": IN_FP8.numbers}, ValueError, r"transposed \[6, 4\] and scales \[4, 1\] do not fit"),
        (IN_FP8, {"scales": torch.ones(6)}, ValueError, r"they need \[6, 4\] and \[6, 1\]"),
        (widen(WEIGHT, 1), {"in_features": 99}, ValueError, r"buffer \[6, 64\] does not fit in_features=99"),
        (widen(WEIGHT, 1), {"sizes": (2, 3)}, ValueError, r"it needs \[5, at least 4\]"),
    ],
)
def test_bad_weights(weight, changed, error, message):
    """Refused where they are made: a kernel would read what lies behind."""
    with pytest.raises(error, match=f"{type(weight).__name__}: .*{message}"):
        dataclasses.replace(weight, **changed)


@pytest.mark.parametrize(
    "weight", [WEIGHT.clone(), widen(WEIGHT, 2), dataclasses.replace(FOUR_BIT, absmax=FOUR_BIT.absmax.clone())]
)
def test_a_weight_that_wants_a_gradient_is_refused(weight):
    tensor = next(t for t in [weight, *vars(weight).values()] if isinstance(t, torch.Tensor) and t.is_floating_point())
    tensor.requires_grad_()
    k = 64 if isinstance(weight, NF4Weight) else 4
    with pytest.raises(ValueError, match="lora_linear: the base weight requires a gradient"):
        lora_linear(torch.ones(2, k), weight, torch.ones(2, k), torch.ones(64 if k == 64 else 6, 2))


@pytest.mark.parametrize("weights", [[], [WEIGHT, torch.ones(6, 5)], [torch.ones(6)]])
def test_what_cannot_be_widened(weights):
    with pytest.raises(ValueError, match=r"widen: the weights have shapes .*; give one or more \[N, K\]"):
        widen(weights, 4)


def test_bad_arguments_of_several_projections():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="only one of a and b"):
        lora_qkv(x, WEIGHT, [DOWN, None], [None, None], sizes=[3, 3])
    with pytest.raises(ValueError, match="give sizes"):
        lora_qkv(x, WEIGHT, [DOWN, None], [torch.ones(3, 2), None])
    with pytest.raises(ValueError, match="magnitude needs one vector"):
        lora_qkv(x, WEIGHT, [DOWN, None], [torch.ones(3, 2), None], sizes=[3, 3], magnitude=[None, torch.ones(3)])
    with pytest.raises(ValueError, match="there are 1 a and 2 b"):
        lora_qkv(x, WEIGHT, [DOWN], [UP, None])
    with pytest.raises(ValueError, match="allowed are 'silu', 'gelu', 'gelu_tanh'"):
        lora_mlp(x, WEIGHT, torch.ones(4, 3), [None] * 3, [None] * 3, activation="relu")
    with pytest.raises(ValueError, match="gate_up needs twice as many"):
        lora_mlp(x, WEIGHT, torch.ones(4, 4), [None] * 3, [None] * 3)
    with pytest.raises(ValueError, match="give three of each"):
        lora_mlp(x, WEIGHT, torch.ones(4, 3), [None], [None])
    with pytest.raises(
        ValueError, match=r"lora_qkv: bias has shapes \[\[3\]\]; give one, or None, for each projection"
    ):
        lora_qkv(x, WEIGHT, [None, None], [None, None], sizes=[3, 3], bias=[torch.ones(3)])
    with pytest.raises(ValueError, match=r"bias has shapes \[\[2\], \[4\]\].*\[\[3\], \[3\]\]"):
        lora_qkv(x, WEIGHT, [None, None], [None, None], sizes=[3, 3], bias=[torch.ones(2), torch.ones(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_bad_arguments_of_the_mlp(dtype, biased):
    """In whichever way it is computed."""
    x, weight, down = torch.ones(2, 4, dtype=dtype), WEIGHT.to(dtype), torch.ones(4, 3, dtype=dtype)
    a, b = torch.ones(2, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    given = {"bias": [None, torch.ones(3, dtype=dtype), None]} if biased else {}
    with pytest.raises(ValueError, match="lora_mlp: a projection has only one of a and b"):
        lora_mlp(x, weight, down, [None, None, a], [None, None, None], **given)
    with pytest.raises(ValueError, match="lora_mlp: a projection has only one of a and b"):
        lora_mlp(x, weight, down, [None, None, None], [None, None, b], **given)
    for count in (1, 2, 4):
        with pytest.raises(ValueError, match=f"lora_mlp: bias has {count} items; give 3"):
            lora_mlp(x, weight, down, [None, None, a], [None, None, b], bias=[torch.ones(3, dtype=dtype)] * count)
    with pytest.raises(ValueError, match="lora_mlp: magnitude has 2 items; give 3"):
        lora_mlp(x, weight, down, [None, None, a], [None, None, b], magnitude=[None, None], **given)


@pytest.mark.gpu
def test_in_a_graph_and_on_another_device(device):
    """A captured forward and backward replays with new inputs and adapters; and no device is taken for the current."""
    target = f"cuda:{torch.cuda.device_count() - 1}"
    problem = Perceptron(target, 1200, 128, 256, 128, [8, 8, 8], torch.bfloat16, torch.float32)
    gate_up, down = widen(problem.weights[:2], 16), widen(problem.weights[2], 8)
    leaves = [t.detach().requires_grad_() for t in (problem.x, *problem.a, *problem.b)]

    def step():
        y = lora_mlp(leaves[0], gate_up, down, leaves[1:4], leaves[4:], dropout=0.0)
        y = y + lora_linear(y, down.weight[:, :128], leaves[1], leaves[6][:, :8])
        return [y, *torch.autograd.grad(y, leaves, problem.dy)]

    with torch.cuda.device(target):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
    for one, two in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    m, k = 2**21 + 3, 1040
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    problem = Problem(device, 1, k, [64], [8], torch.bfloat16, torch.float32)
    wide = widen(problem.weights, 8)
    a, b = (t.requires_grad_() for t in (problem.a[0], problem.b[0]))
    y = lora_linear(x.requires_grad_(), wide, a, b)
    dy = torch.zeros_like(y)
    dy[-3:] = torch.randn_like(dy[-3:])
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    last = x[-3:].detach().double().requires_grad_()
    ad, bd = (t.detach().double().requires_grad_() for t in (a, b))
    exact = lora_linear(last, problem.weights[0].double(), ad, bd)
    grads = torch.autograd.grad(exact, (last, ad, bd), dy[-3:].double())
    for ours_, theirs in zip((y[-3:], dx[-3:], da, db), (exact, *grads), strict=True):
        assert (ours_.double() - theirs).norm() <= 1e-2 * theirs.norm()
