from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import dispatch
from ft_kernels.functional.lora import lora_linear, lora_qkv, widen
from ft_kernels.nn.lora import LoRALinear
from ft_kernels.ops.lora import operands, products, reference

KERNELS = ("lora_pack", "lora_rows", "lora_a_gradient", "lora_b_gradient")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# PEFT keeps adapters of 16-bit models in fp32 by default.
PAIRS = [(t, t) for t in DTYPES] + [(t, torch.float32) for t in DTYPES[:2]]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Widened from the first row on."""
    monkeypatch.setattr(products, "SMALL", 0)


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


def plain(problem, scaling, weight=None):
    """What PEFT computes: the updates added to the base's output."""
    weight = torch.cat(problem.weights) if weight is None else weight

    def compute(x, a, b, bias, magnitude):
        base = F.linear(x, weight, bias)
        shifts = [None] * len(a) if bias is None else bias.split(problem.sizes)
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
    eager = same.run(plain(same, scaling, same_weight), **options)
    exact = problem.cast(torch.float64)
    exact = exact.run(plain(exact, scaling), **options)
    for i, three in enumerate(zip(actual, eager, exact, strict=True)):
        exact_enough(f"number {i} of y, dx, da, db, dbias, dmagnitude", *three)


@settings(max_examples=8)
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
