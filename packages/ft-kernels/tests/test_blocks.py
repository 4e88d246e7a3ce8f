from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ft_kernels as ft
from ft_kernels import dispatch
from ft_kernels.functional.lora import Fp8Weight, Int8Weight, NF4Weight, widen
from ft_kernels.ops.blocks import reference
from ft_kernels.ops.lora import weight_side

BLOCKS = importlib.import_module("ft_kernels.functional.checked_blocks")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
H, HEADS, KV_HEADS, D, INNER = 64, 4, 2, 16, 96
N, G = HEADS * D, KV_HEADS * D
KEEP = ("all", "most", "inputs", "none")
SCALING = {"attention": [2.0, 1.0, 0.5, 1.5], "mlp": [0.7, 2.0, 1.5]}
SIZES = {"attention": [(N, H), (G, H), (G, H), (H, N)], "mlp": [(INNER, H), (INNER, H), (H, INNER)]}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Widened from the first row on."""
    monkeypatch.setattr(weight_side, "SMALL", 0)


@pytest.fixture(autouse=True)
def rounding_as_gpus(monkeypatch):
    """Triton's interpreter cuts fp32 off where it stores bf16; what follows in a block would be judged by that."""
    if torch.cuda.is_available():
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter._convert_float

    def convert(data, given, wanted, mode):
        if (given.name, wanted.name) != ("fp32", "bf16"):
            return plain(data, given, wanted, mode)
        bits = data.view("uint32")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    for module in ("lora.kernels", "lora.packing", "lora_mlp.kernels"):  # which add half a unit before they are cut off
        kernels = importlib.import_module(f"ft_kernels.ops.{module}")
        monkeypatch.setattr(kernels, "rounds_by_hand", lambda dtype: False)


def attend(q, k, v):
    """Causal attention by operations that give the same bits each time, on a GPU too."""
    k, v = (t.repeat_interleave(q.shape[-2] // k.shape[-2], -2).transpose(-2, -3) for t in (k, v))
    scores = q.transpose(-2, -3) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(mask, -torch.inf).softmax(-1) @ v).transpose(-2, -3)


def sdpa(q, k, v):
    q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(-2, -3)


class Problem:
    """One half of a layer, an input and a gradient from above, of about unit scale; 8 rows of the input are large."""

    def __init__(self, half, device, dtype, *, ranks=None, adapters=None, qk_norm=False, bias=False, shape=(2, 20)):
        generator = torch.Generator().manual_seed(3)

        def normal(*size, dtype=dtype, scale=1.0):
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        self.half, self.scaling, self.qk_norm = half, SCALING[half], qk_norm
        sizes = SIZES[half]
        ranks = ranks or [4] * len(sizes)
        adapters = adapters or dtype
        self.x, self.dy = normal(*shape, H), normal(*shape, H)
        self.x.view(-1, H)[::5] *= 8
        self.weights = [normal(n, k, scale=k**-0.5) for n, k in sizes]
        self.norms = [normal(H).abs() + 0.5, normal(D).abs() + 0.5, normal(D).abs() + 0.5]
        angles = torch.randn(shape[-1], D // 2, generator=generator).repeat(1, 2).to(device)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.bias = [normal(n) if bias and i != 1 else None for i, (n, _) in enumerate(sizes)]
        self.a, self.b = [], []
        for r, (n, k) in zip(ranks, sizes, strict=True):
            self.a.append(None if r is None else normal(r, k, dtype=adapters, scale=k**-0.5))
            self.b.append(None if r is None else normal(n, r, dtype=adapters, scale=r**-0.5))

    def cast(self, dtype):
        """The same numbers in another dtype."""
        other = object.__new__(Problem)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [v.to(dtype) if isinstance(v, torch.Tensor) else v for v in value]
            setattr(other, name, value.to(dtype) if isinstance(value, torch.Tensor) else value)
        return other

    def leaves(self, need_x=True):
        x = self.x.detach().requires_grad_(need_x)
        return x, *([None if t is None else t.detach().requires_grad_() for t in ts] for ts in (self.a, self.b))

    def run(self, compute, *, need_x=True):
        """The output and the gradients of x, all a and all b; none of x where it needs none."""
        x, a, b = self.leaves(need_x)
        y = compute(x, a, b)
        kinds = [kind for kind in ([x] if need_x else [], *([t for t in ts if t is not None] for ts in (a, b))) if kind]
        grads = list(torch.autograd.grad(y, [t for kind in kinds for t in kind], self.dy.to(y.dtype)))
        return [y, *(torch.cat([grads.pop(0).flatten() for _ in kind]) for kind in kinds)]

    def forms(self, form):
        """Both products' weights in a form that the operations take."""
        if form == "wide":
            room = [sum(t.shape[0] for t in ts if t is not None) for ts in (self.a[:-1], self.a[-1:])]
            return widen(self.weights[:-1], room[0]), widen(self.weights[-1], room[1])
        if form == "nf4":
            parts = [NF4Weight.quantize(w) for w in self.weights]
            self.weights = [
                ft.nf4_dequantize(p.packed, p.absmax, p.shape, w.dtype, nested=p.nested)
                for p, w in zip(parts, self.weights, strict=True)
            ]
        elif form == "int8":
            scales = [w.float().abs().amax(1) for w in self.weights]
            codes = [(w.float() * 127 / s[:, None]).round().char() for w, s in zip(self.weights, scales, strict=True)]
            parts = [Int8Weight(c, s) for c, s in zip(codes, scales, strict=True)]
            self.weights = [ft.int8_dequantize(p.quantized, p.scales, self.x.dtype) for p in parts]
        else:
            parts = self.weights if form == "plain" else [Fp8Weight.quantize(w) for w in self.weights]
        return parts[:-1], parts[-1]

    def settings(self, attention=sdpa):
        norms = [ft.Norm(weight, 1e-5) for weight in self.norms]
        given = {"scaling": self.scaling, "bias": self.bias}
        if self.half == "mlp":
            return norms[0], given
        q_norm, k_norm = norms[1:] if self.qk_norm else (None, None)
        heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D}
        turns = {"cos": self.cos, "sin": self.sin, "q_norm": q_norm, "k_norm": k_norm, "attention": attention}
        return norms[0], {**given, **heads, **turns}

    def block(self, form="wide", attention=sdpa, weights=None, **settings):
        first, second = weights or self.forms(form)
        norm, given = self.settings(attention)
        function = ft.mlp_block if self.half == "mlp" else ft.attention_block
        return lambda x, a, b: function(x, norm, first, second, a, b, **{**given, **settings})

    def plain(self, x, a, b):
        """What transformers and PEFT compute."""

        def linear(x, i):
            y = F.linear(x, self.weights[i], self.bias[i])
            if a[i] is None:
                return y
            return y + F.linear(F.linear(x, a[i].to(x.dtype)), b[i].to(x.dtype)) * self.scaling[i]

        def norm(x, weight):
            wide = x.to(torch.promote_types(x.dtype, FULL))
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

        def turn(x):
            cos, sin = (t.to(x.dtype)[:, None] for t in (self.cos, self.sin))
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        n = norm(x, self.norms[0])
        if self.half == "mlp":
            return x + linear(F.silu(linear(n, 0)) * linear(n, 1), 2)
        q, k, v = (linear(n, i).unflatten(-1, (-1, D)) for i in range(3))
        if self.qk_norm:
            q, k = norm(q, self.norms[1]), norm(k, self.norms[2])
        return x + linear(sdpa(turn(q), turn(k), v).flatten(-2), 3)

    def in_another_order(self, seed):
        """The same, with features shuffled: another order of each sum, another sample of eager's error in fp32."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(H, generator=generator).to(self.x.device)
        inner = torch.arange(N) if self.half == "attention" else torch.randperm(INNER, generator=generator)
        inner = inner.to(self.x.device)
        other = self.cast(self.x.dtype)
        other.norms = [self.norms[0][order], *self.norms[1:]]
        mixes = self.half == "mlp"
        other.weights = [w[:, order][inner] if mixes else w[:, order] for w in self.weights[:-1]]
        other.weights.append(self.weights[-1][order][:, inner])
        other.bias = [None if t is None else t[inner] if mixes else t for t in self.bias[:-1]]
        other.bias.append(None if self.bias[-1] is None else self.bias[-1][order])

        def compute(x, a, b):
            a = [None if t is None else t[:, order] for t in a[:-1]] + [None if a[-1] is None else a[-1][:, inner]]
            b = [t if t is None or not mixes else t[inner] for t in b[:-1]] + [None if b[-1] is None else b[-1][order]]
            return other.plain(x[..., order], a, b)[..., order.argsort()]

        return compute


CASES = [
    ("attention", "wide", BRAIN, FULL, {"qk_norm": True}),
    ("attention", "wide", HALF, HALF, {"bias": True, "ranks": [4, None, 20, 3]}),
    ("attention", "plain", BRAIN, BRAIN, {"ranks": [None, 3, None, 5]}),
    ("attention", "plain", FULL, FULL, {"qk_norm": True, "bias": True}),
    ("attention", "wide", FULL, FULL, {"ranks": [4, 6, 2, None]}),
    ("attention", "nf4", BRAIN, FULL, {}),
    ("attention", "int8", HALF, FULL, {"qk_norm": True, "ranks": [4, 4, 4, None]}),
    ("attention", "nf4", BRAIN, BRAIN, {"ranks": [None] * 4}),
    ("mlp", "wide", BRAIN, FULL, {}),
    ("mlp", "wide", HALF, HALF, {"ranks": [3, 20, 6], "bias": True}),
    ("mlp", "plain", BRAIN, BRAIN, {"ranks": [4, None, 70]}),
    ("mlp", "wide", FULL, FULL, {"ranks": [4, 6, None]}),
    ("mlp", "nf4", BRAIN, FULL, {"ranks": [None, None, 4]}),
    ("mlp", "int8", HALF, FULL, {"ranks": [None, 4, None]}),
    ("mlp", "plain", BRAIN, BRAIN, {"ranks": [None] * 3}),
]


@pytest.mark.parametrize(("half", "form", "dtype", "adapters", "options"), CASES, ids=str)
def test_exact(device, exact_enough, half, form, dtype, adapters, options):
    problem = Problem(half, device, dtype, adapters=adapters, **options)
    block = problem.block(form)
    before = dispatch.launches.copy()
    actual = problem.run(block)
    launched = dispatch.launches - before
    assert launched["rms_norm_backward"]
    assert launched["rope_backward" if half == "attention" else "glu_backward"] or launched["lora_middle"]
    assert_exact(problem, actual, exact_enough)


def assert_exact(problem, actual, exact_enough):
    """Of the output and all gradients, the errors against float64 are no larger than eager's, or rounding once."""
    dtype = problem.x.dtype
    same, exact = problem.cast(dtype), problem.cast(torch.float64)
    exact.cos, exact.sin = problem.cos.double(), problem.sin.double()
    others = [same.in_another_order(seed) for seed in range(4 if dtype == FULL else 0)]
    eager = zip(*(same.run(compute) for compute in (same.plain, *others)), strict=True)
    for what, *three in zip(("y", "dx", "da", "db"), actual, eager, exact.run(exact.plain), strict=False):
        exact_enough(what, *three)


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize(("dtype", "dropout"), [(BRAIN, 0.0), (BRAIN, 0.3), (FULL, 0.0)])
def test_what_is_kept_changes_no_bit(device, half, dtype, dropout):
    problem = Problem(half, device, dtype, adapters=FULL, qk_norm=dtype == BRAIN and not dropout, bias=True)
    weights, results = problem.forms("wide"), []
    for keep in KEEP[1:3] if dropout else KEEP:
        torch.manual_seed(0)
        results.append(problem.run(problem.block(weights=weights, attention=attend, keep=keep, dropout=dropout)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
    if dropout:
        torch.manual_seed(1)
        assert not torch.equal(problem.block(weights=weights, dropout=dropout)(*problem.leaves()), results[0][0])


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_dropout_is_that_of_the_products(device, monkeypatch, half):
    """With the same seeds, the block's kernels drop what torch does."""
    seed = torch.tensor([3, 4], device=device)
    single = iter([seed[:1], seed[1:]])
    monkeypatch.setattr(BLOCKS, "draw_seed", lambda x, dropout, count=1: seed)
    for module in ("lora", "lora_mlp"):
        draw = (lambda x, p, count=1: next(single)) if module == "lora" else (lambda x, p, count=1: seed)
        monkeypatch.setattr(importlib.import_module(f"ft_kernels.functional.{module}"), "draw_seed", draw)
    problem = Problem(half, device, HALF, adapters=FULL)
    weights = problem.forms("wide")
    by_block = problem.run(problem.block(weights=weights, dropout=0.4))
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    for one, two in zip(by_block, problem.run(problem.block(weights=weights, dropout=0.4)), strict=True):
        assert (one.float() - two.float()).norm() < 3e-3 * two.float().norm()


class Live(TorchDispatchMode):
    """The bytes of tensors made inside that are still there."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                given = [t for t in args if isinstance(t, torch.Tensor)]
                if storage not in self.known and all(t.untyped_storage()._cdata != storage._cdata for t in given):
                    self.known.add(storage)
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage.nbytes())
        return made

    def gone(self, size):
        self.bytes -= size


class Peak(Live):
    """And the most there were at a time."""

    peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(function, types, args, kwargs)
        if self.bytes > self.peak:
            gc.collect()  # the interpreter's garbage
            self.peak = max(self.peak, self.bytes)
        return made


def saved_by(compute):
    """The distinct memory saved for backward: bytes by address."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return storages, result


def own_of_attention(problem, attention):
    """Bytes that the attention keeps beside q, k and v."""
    rows = problem.x.shape[:-1]
    leaves = [problem.x.new_zeros(*rows, n, D).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS)]
    storages, out = saved_by(lambda: attention(*leaves))
    storages[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
    return sum(storages.values()) - sum(t.nbytes for t in leaves)


def formula(problem, keep):
    """As the docstrings have it, in bytes a token, without what the attention keeps."""
    e, f = problem.x.element_size(), 8 if problem.x.dtype == FULL else 4
    ranks = [0 if t is None else t.shape[0] for t in problem.a]
    r, s = (-(-n // 16) * 16 for n in (sum(ranks[:-1]), ranks[-1]))
    activations = N + 2 * G if problem.half == "attention" else 2 * INNER
    kept = (H + r + s) * e
    if keep in ("all", "most"):
        kept += activations * e + f
    if keep == "all":
        kept += -(-(H + r) // 64) * 64 * e if r else 0
        kept += ((N + G) * e + (HEADS + KV_HEADS) * 8) if problem.qk_norm else 0  # these rows are short
    return kept


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize(
    ("half", "dtype", "options"),
    [
        ("attention", HALF, {"qk_norm": True, "ranks": [4, None, 20, 3]}),
        ("attention", FULL, {"ranks": [None, None, None, 4]}),
        ("mlp", HALF, {}),
        ("mlp", FULL, {"ranks": [None, None, 4]}),
    ],
)
def test_bytes_kept(device, keep, half, dtype, options):
    """What hooks see, and what is there, is what the docstrings say, and nothing of the frozen weights."""
    problem = Problem(half, device, dtype, adapters=FULL, **options)
    weights = problem.forms("wide")
    block, leaves = problem.block(weights=weights, attention=ft.packed_attention, keep=keep), problem.leaves()
    if device == "cuda":
        block(*leaves)  # what is made once for a device is there
    rows = problem.x.numel() // H
    expected = rows * formula(problem, keep)
    if half == "attention" and keep != "none":
        expected += own_of_attention(problem, ft.packed_attention)
    adapters = sum(t.nbytes for ts in leaves[1:] for t in ts if t is not None)
    gc.collect()
    with Live() as live:
        storages, y = saved_by(lambda: block(*leaves))
        gc.collect()
        held = live.bytes - y.untyped_storage().nbytes()
    assert sum(storages.values()) == expected + adapters
    # x lies with its maker; of what autograd wants there are a few bytes.
    assert expected - problem.x.nbytes <= held <= expected - problem.x.nbytes + 64
    frozen = [*problem.norms, problem.cos, problem.sin, *(w.buffer for w in weights)]
    assert not storages.keys() & {t.untyped_storage().data_ptr() for t in frozen}
    with torch.no_grad():
        storages, y = saved_by(lambda: block(*leaves))
    assert not storages
    assert not y.requires_grad


@pytest.mark.parametrize(("half", "keep"), [("attention", "most"), ("attention", "inputs"), ("mlp", "most")])
def test_around_the_block(device, half, keep):
    """Under hooks that move what is saved, under checkpoint, autocast and without gradients it is the same."""
    problem = Problem(half, device, HALF, adapters=FULL, qk_norm=True, shape=(2, 6))  # the interpreter is slow in bf16
    block = problem.block(attention=attend, keep=keep)
    expected = problem.run(block)

    def moved(x, a, b):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
            return block(x, a, b)

    def checkpointed(x, a, b, reentrant=False):
        pairs = (*a, *b)
        return checkpoint(lambda x, *ab: block(x, ab[: len(a)], ab[len(a) :]), x, *pairs, use_reentrant=reentrant)

    def autocast(x, a, b):
        with torch.autocast(device, BRAIN):
            return block(x, a, b)

    for compute in (moved, checkpointed, autocast):
        for one, two in zip(problem.run(compute), expected, strict=True):
            assert torch.equal(one, two)
    x, a, b = problem.leaves()
    checkpointed(x, a, b, reentrant=True).backward(problem.dy)
    grads = [x.grad, *(torch.cat([t.grad.flatten() for t in ts]) for ts in (a, b))]
    for one, two in zip(grads, expected[1:], strict=True):
        assert torch.equal(one.flatten(), two)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(block(problem.x, problem.a, problem.b), expected[0])
    without_x = problem.run(block, need_x=False)
    for one, two in zip(without_x[1:], expected[2:], strict=True):
        assert (one - two).norm() <= 1e-2 * two.norm()
    x, a, b = problem.leaves()
    a[0].requires_grad_(False)
    (db,) = torch.autograd.grad(block(x, a, b), b[0], problem.dy)
    assert torch.equal(db.flatten(), expected[3][: db.numel()])


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_frozen_adapters_and_x_alone(device, half):
    problem = Problem(half, device, BRAIN)
    block = problem.block("wide")
    expected = problem.run(block)
    x = problem.x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(block(x, problem.a, problem.b), x, problem.dy)
    assert (dx.flatten() - expected[1]).norm() <= 1e-2 * expected[1].norm()
    y = block(*problem.leaves(need_x=False))
    assert torch.equal(y, expected[0])


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_a_second_backward(device, half):
    problem = Problem(half, device, FULL)
    for keep in KEEP:
        leaves = problem.leaves()
        y = problem.block(keep=keep)(*leaves)
        (first,) = torch.autograd.grad(y.sum(), leaves[0], retain_graph=True)
        if keep == "none" or (half, keep) == ("mlp", "inputs"):
            assert torch.equal(first, torch.autograd.grad(y.sum(), leaves[0])[0])
        else:
            with pytest.raises(RuntimeError, match=f"{half}_block: backward was called a second time"):
                torch.autograd.grad(y.sum(), leaves[0])
    x = problem.x.detach().requires_grad_()
    dx = torch.autograd.grad(problem.block()(x, problem.a, problem.b).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [BRAIN, FULL])
def test_documents_of_a_plan_are_alone(device, dtype):
    lengths = [13, 27]
    problem = Problem("attention", device, dtype, adapters=FULL, shape=(1, 40), qk_norm=True)
    weights = problem.forms("wide")
    plan = ft.plan_attention(lengths=lengths)
    packed = problem.run(problem.block(weights=weights, attention=functools.partial(ft.packed_attention, plan=plan)))
    alone = []
    for part in torch.arange(40).split(lengths):
        one = problem.cast(dtype)
        one.x, one.dy, one.cos, one.sin = problem.x[:, part], problem.dy[:, part], problem.cos[part], problem.sin[part]
        alone.append(one.run(one.block(weights=weights, attention=ft.packed_attention, keep="inputs")))
    joined = [torch.cat([y, dx.view_as(y)], 0) for y, dx, *_ in alone]
    bound = 1e-2 if dtype == BRAIN else 1e-5
    given = torch.cat([packed[0], packed[1].view_as(packed[0])], 0)
    assert (given - torch.cat(joined, 1)).norm() <= bound * given.norm()
    for i in (2, 3):
        total = alone[0][i] + alone[1][i]
        assert (packed[i] - total).norm() <= bound * total.norm()


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_shapes_and_layouts(device, half):
    problem = Problem(half, device, FULL, shape=(1, 20))
    weights = problem.forms("plain")
    block = problem.block(weights=weights, attention=attend)
    expected = problem.run(block)
    flat = problem.cast(FULL)
    flat.x, flat.dy = flat.x[0], flat.dy[0]
    strided = problem.cast(FULL)
    strided.x = problem.x.transpose(1, 2).contiguous().transpose(1, 2)
    strided.dy = torch.cat([problem.dy, problem.dy], -1)[..., :H]
    for other in (flat, strided):
        for one, two in zip(other.run(other.block(weights=weights, attention=attend)), expected, strict=True):
            assert torch.equal(one.flatten(), two.flatten())
    x, a, b = problem.leaves()
    empty = block(x[:, :0], a, b)
    assert empty.shape == (1, 0, H)
    dx, da = torch.autograd.grad(empty.sum(), (x, a[0]))
    assert not dx.any()
    assert not da.any()
    with torch.no_grad():
        assert torch.equal(block(x, a, b), expected[0])


@pytest.mark.parametrize("rotary", [None, {"rotary_dim": 8}, {"rotary_dim": 8, "layout": "interleaved"}], ids=str)
def test_rotations(device, rotary):
    """None, of a part of each head, in the other layout; with a norm of the queries alone."""
    problem = Problem("attention", device, FULL)
    first, second = problem.forms("plain")
    norm, given = problem.settings(attend)
    given |= {"q_norm": ft.Norm(problem.norms[1], 1e-5), **(rotary or {})}
    given |= {"cos": problem.cos[:, :4], "sin": problem.sin[:, :4]} if rotary else {"cos": None, "sin": None}
    actual = [
        problem.run(lambda x, a, b, keep=keep: ft.attention_block(x, norm, first, second, a, b, keep=keep, **given))
        for keep in KEEP
    ]
    settings = {"rotary_dim": None, "k_norm": None, "dropout": 0.0, "training": True} | given
    plain = problem.run(lambda x, a, b: reference.attention_block(x, norm, first, second, a, b, **settings))
    for one in actual:
        for two, three in zip(one, plain, strict=True):
            torch.testing.assert_close(two, three, rtol=1e-4, atol=1e-4)


def test_what_attention_may_do(device):
    """Not all inputs need to matter; the output's shape does."""
    problem = Problem("attention", device, FULL)
    for keep in KEEP:
        of_v = problem.block(attention=lambda q, k, v: v.repeat_interleave(2, -2), keep=keep)
        _, dx, da, _ = problem.run(of_v)
        assert torch.isfinite(dx).all()
        assert not da[: 8 * H].any()  # of q and k
        assert da[8 * H : 12 * H].any()
        of_q = problem.run(problem.block(attention=lambda q, k, v: q * 1.0, keep=keep))
        assert torch.isfinite(of_q[1]).all()
        with pytest.raises(ValueError, match=r"attention gave \[2, 20, 64\] .* needs q's \[2, 20, 4, 16\]"):
            problem.run(problem.block(attention=lambda q, k, v: q.flatten(-2), keep=keep))
    with pytest.raises(RuntimeError, match="a tensor without a graph"):
        problem.run(problem.block(attention=lambda q, k, v: q.detach()))


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_fp8_base(device, half):
    problem = Problem(half, device, BRAIN, adapters=FULL)
    actual = problem.run(problem.block("fp8"))
    exact = problem.cast(torch.float64)
    for one, two in zip(actual, exact.run(exact.plain), strict=True):
        assert (one.double() - two).norm() < 0.15 * two.norm()


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("biases", [HALF, FULL])
def test_a_block_object_sees_changed_biases(device, half, biases):
    """What is copied of them, side by side or into x's dtype, is copied at each call; first under inference_mode."""
    problem = Problem(half, device, HALF, bias=True)
    problem.bias = [None if t is None else t.to(biases) for t in problem.bias]
    first, second = problem.forms("wide")
    norm, given = problem.settings()
    called = {k: given.pop(k) for k in ("cos", "sin", "attention") if k in given}
    kind = ft.MLPBlock if half == "mlp" else ft.AttentionBlock
    x, a, b = problem.leaves()
    block = kind(norm, first, second, a, b, **given)
    with torch.inference_mode():
        before = block(problem.x, **called)
    with torch.no_grad():
        for shift in problem.bias:
            if shift is not None:
                shift.mul_(-3)
    function = ft.mlp_block if half == "mlp" else ft.attention_block
    after, fresh = block(x, **called), function(x, norm, first, second, a, b, **given, **called)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)
    assert torch.equal(*(torch.autograd.grad(y, x, problem.dy)[0] for y in (after, fresh)))


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_without_the_kernels(device, monkeypatch, half):
    """Of torch alone, in float64 and where there is no triton; gradients as autograd has them."""
    exact = Problem(half, device, torch.float64, qk_norm=True, bias=True, shape=(1, 6))
    block = exact.block("plain", attention=attend)
    for one, two in zip(exact.run(block), exact.run(exact.plain), strict=True):
        torch.testing.assert_close(one, two)
    by_kernels = Problem(half, device, FULL)
    expected = by_kernels.run(by_kernels.block("plain"))
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    for one, two in zip(by_kernels.run(by_kernels.block("plain", keep="none")), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


ONES = torch.ones(8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(8)}, ValueError, r"x has shape \[8\]; the weights need \[S, 8\] or \[B, S, 8\]"),
        ({"x": torch.ones(3, 9)}, ValueError, r"x has shape \[3, 9\]"),
        ({"x": torch.ones(3, 8).half()}, TypeError, "x has dtype torch.float16, a weight torch.float32"),
        ({"keep": "some"}, ValueError, "keep='some'; allowed are 'all', 'most', 'inputs', 'none'"),
        ({"heads": 3}, ValueError, "heads=3, kv_heads=1 and head_dim=4 make .* qkv has 16 in all, o 8 inputs"),
        ({"o": torch.ones(9, 8)}, ValueError, "the last weight has 9 outputs; x has 8"),
        ({"norm": ft.Norm(torch.ones(7), 1e-5)}, ValueError, r"norm has a weight \[7\] on cpu; it needs \[8\]"),
        ({"q_norm": ft.Norm(torch.ones(8), 1e-5)}, ValueError, r"q_norm has a weight \[8\] on cpu; it needs \[4\]"),
        ({"norm": ft.Norm(ONES[0].clone().requires_grad_(), 1e-5)}, ValueError, "of norm requires a gradient"),
        ({"norm": ft.Norm(ONES[0].long(), 1e-5)}, TypeError, "norm has a weight of dtype torch.int64"),
        ({"bias": [ONES[0].clone().requires_grad_(), None, None, None]}, ValueError, "a bias requires a gradient"),
        ({"bias": [None, ONES[0], None, None]}, ValueError, r"a bias has shape \[8\] .* needs \[4\]"),
        ({"bias": [None]}, ValueError, "there are 1 biases; give 4"),
        ({"a": [None] * 3}, ValueError, "there are 3 a and 4 b; give 4 of each"),
        ({"a": [ONES[:2], None, None, None]}, ValueError, "only one of a and b"),
        ({"scaling": [1.0]}, ValueError, "scaling has 1 numbers for 4"),
        ({"sin": None}, ValueError, "only one of cos and sin"),
        ({"cos": torch.ones(2, 4), "sin": torch.ones(2, 4)}, ValueError, r"1 sequences of 3 tokens need"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0; allowed is 0 to below 1"),
        ({"qkv": torch.ones(16, 8, requires_grad=True)}, ValueError, "the base weight requires a gradient"),
    ],
)
def test_bad_arguments(arguments, error, message):
    given = {
        "x": torch.ones(3, 8), "norm": ft.Norm(ONES[0], 1e-5), "qkv": torch.ones(16, 8), "o": ONES, "a": [None] * 4,
        "b": [None] * 4, "heads": 2, "kv_heads": 1, "head_dim": 4, "cos": torch.ones(3, 4), "sin": torch.ones(3, 4),
        "attention": attend,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ft.attention_block(**{**given, **arguments})


def test_bad_arguments_of_the_mlp():
    given = {"norm": ft.Norm(ONES[0], 1e-5), "gate_up": torch.ones(8, 8), "down": torch.ones(8, 4)}
    given |= {"x": ONES, "a": [None] * 3, "b": [None] * 3}
    with pytest.raises(ValueError, match="activation='relu'; allowed are 'silu', 'gelu', 'gelu_tanh'"):
        ft.mlp_block(**given, activation="relu")
    with pytest.raises(ValueError, match="gate_up needs twice as many"):
        ft.mlp_block(**{**given, "down": ONES})
    with pytest.raises(TypeError, match=r"dtypes \['torch.float16', 'torch.float32'\]; use one for all"):
        ft.mlp_block(**{**given, "a": [ONES, None, ONES[:, :4].half()], "b": [ONES[:4], None, ONES.half()]})


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_compile(device, half):
    problem = Problem(half, device, FULL)
    block = problem.block("plain", attention=attend)
    compiled = torch.compile(lambda x, a, b: block(x * 1.0, a, b) * 2, backend="aot_eager")
    for one, two in zip(problem.run(compiled), problem.run(lambda x, a, b: block(x, a, b) * 2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("form", ["wide", "nf4", "plain"])
@pytest.mark.parametrize("ranks", [[4, 4, 4], [4, None, None], [None] * 3], ids=str)
def test_a_graph_without_an_answer(device, form, ranks):
    """The perceptron's half computed for its gradients alone gives these gradients, and leaves the last product out."""
    problem = Problem("mlp", device, HALF, adapters=FULL, ranks=ranks)
    first, second = problem.forms(form)
    norm, given = problem.settings()
    results, counts = [], []
    for answer in (True, False):

        def compute(x, a, b, answer=answer):
            return ft.MLPBlock(norm, first, second, a, b, **given)(x, answer=answer)

        results.append(problem.run(compute)[1:])
        mode = Products()
        with mode:
            compute(*problem.leaves())
        counts.append(mode.count)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    assert counts[1] < counts[0] or form == "plain" or ranks[2] is None


def test_the_peak_of_the_perceptron(device):
    """Beside what comes in and goes out: [G | U], and h or its gradient or the normed rows, not all of these."""
    if torch.cuda.is_available():
        pytest.skip("sums have more parts on a GPU; test_on_a_gpu.py of ft-core measures there")
    problem = Problem("mlp", device, HALF, adapters=FULL, shape=(2, 256))
    block, leaves = problem.block(keep="inputs"), problem.leaves()
    problem.run(block)
    wide = max(-(-(INNER + 16) // 64) * 64, -(-(H + 16) // 64) * 64 + H)
    sums = 4 * (2 * sum(t.numel() for t in (*problem.a, *problem.b)) + 16 * 512)
    gc.collect()
    mode = Peak()
    with mode:
        y = block(*leaves)
        forward = mode.peak
        mode.peak = 0
        torch.autograd.grad(y, [leaves[0], *leaves[1], *leaves[2]], problem.dy)
    for peak in (forward, mode.peak):
        assert peak <= 512 * 2 * (2 * INNER + wide + 2 * H) + 2 * sums


def counted(script, *cases):
    """What a program that counts memory on tensors without any prints; it makes up a GPU, and shall find none.

    Nor triton's interpreter, for which kernels split their sums into fewer parts than for a GPU.
    """
    words = [sys.executable, "-W", "ignore", str(script), *cases]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_peak_at_real_sizes():
    """Of 4096 tokens through a layer of Llama 3.1 8B. An expanded weight of gate and up is there once at most."""
    tokens, width, inner, rank = 4096, 4096, 14336, 16
    script = Path(__file__).with_name("real_sizes.py")
    cases = [f"{form}/{keep}" for form in ("wide", "nf4") for keep in ("most", "inputs")]
    done = counted(script, *cases)
    both, y = tokens * 2 * inner * 2, tokens * width * 2
    row, h = (tokens * -(-(n + r) // 64) * 64 * 2 for n, r in ((width, 2 * rank), (inner, rank)))
    gate_up, down = 2 * inner * (row // tokens), width * (h // tokens)
    for case, (forward, backward) in done.items():
        one, two = (gate_up, down) if case.startswith("nf4") else (0, 0)
        assert forward == pytest.approx(max(both + row + y + one, both + h + y + two), rel=0.02)
        most = max(both + row + y + one, both + h + y + two) + sums_in_parts(width, inner, rank)
        assert backward == pytest.approx(most, rel=0.02)


def sums_in_parts(width, inner, rank):
    """Bytes of the gradients of A and B of gate, up and down in fp32, seven times: so many programs share the rows of
    4096 tokens that all of them fill a card of 132 multiprocessors."""
    return 7 * 4 * rank * 3 * (width + inner)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[512] * 4, [300, 212, 1536], [70, 1978]], ids=str)
def test_with_each_attention_of_a_gpu(device, monkeypatch, lengths):
    """Dense, flex and our kernel hold nothing of q, k and v, and on another device than the current one."""
    monkeypatch.setattr(weight_side, "SMALL", 128)
    target = f"cuda:{torch.cuda.device_count() - 1}"
    problem = Problem("attention", target, BRAIN, adapters=FULL, shape=(1, sum(lengths)))
    plan = ft.plan_attention(lengths=lengths)
    attention = functools.partial(ft.packed_attention, plan=plan)
    weights = problem.forms("wide")
    results, held = [], []
    for keep in KEEP:
        block, leaves = problem.block(weights=weights, attention=attention, keep=keep), problem.leaves()
        results.append([t.detach() for t in problem.run(block)])
        y = block(*leaves)
        gc.collect()  # a compiler's garbage; and threads of backward let go of what they had last
        held_with_it, size = torch.cuda.memory_allocated(target), y.nbytes
        del y
        held.append(held_with_it - torch.cuda.memory_allocated(target) - size)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert (one - two).norm() <= 5e-3 * two.norm()
    rows = problem.x.numel() // H
    own = own_of_attention(problem, attention)
    for keep, size in zip(KEEP, held, strict=True):
        expected = rows * formula(problem, keep) - problem.x.nbytes + (own if keep != "none" else 0)
        assert abs(size - expected) <= 2**17  # 512 bytes a block; what the plan holds is counted as kept


@pytest.mark.gpu
@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_in_a_graph(device, half):
    """A captured forward and backward replays with new adapters."""
    problem = Problem(half, device, BRAIN, adapters=FULL, shape=(2, 256))
    block = problem.block(attention=attend)
    leaves = problem.leaves()
    every = [leaves[0], *leaves[1], *leaves[2]]

    def step():
        y = block(*leaves)
        return [y, *torch.autograd.grad(y, every, problem.dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in every:
            leaf.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(captured, step(), strict=True):
        assert (one - two).norm() <= 1e-2 * two.norm()


TILED = [
    ("attention", "wide", BRAIN, FULL, {"qk_norm": True, "bias": True}, 7),
    ("attention", "nf4", HALF, FULL, {"ranks": [64, None, 3, 5], "shape": (1, 40)}, 16),
    ("attention", "plain", FULL, FULL, {"qk_norm": True, "bias": True, "shape": (5, 8)}, 17),
    ("attention", "int8", HALF, HALF, {"ranks": [4, 4, 4, None]}, 39),
    ("attention", "plain", BRAIN, BRAIN, {"ranks": [None, 3, None, 130]}, 16),
    ("mlp", "wide", BRAIN, FULL, {"bias": True}, 7),
    ("mlp", "nf4", BRAIN, FULL, {"ranks": [64, 64, 64]}, 16),
    ("mlp", "nf4", HALF, FULL, {"ranks": [None, None, 4]}, 39),
    ("mlp", "int8", HALF, FULL, {"ranks": [None, 4, None]}, 16),
    ("mlp", "plain", BRAIN, BRAIN, {"ranks": [4, None, 70]}, 13),
    ("mlp", "wide", HALF, HALF, {"ranks": [3, 20, 130]}, 16),
    ("mlp", "wide", FULL, FULL, {"ranks": [4, 6, None]}, 16),
    ("mlp", "plain", BRAIN, BRAIN, {"ranks": [None] * 3}, 16),
]


@pytest.mark.parametrize(("half", "form", "dtype", "adapters", "options", "tile"), TILED, ids=str)
def test_tiles_are_exact(device, exact_enough, half, form, dtype, adapters, options, tile):
    problem = Problem(half, device, dtype, adapters=adapters, **options)
    assert_exact(problem, problem.run(problem.block(form, tile=tile)), exact_enough)


def assert_as_untiled(actual, untiled):
    """No further than a rounding or two of the dtype: sums over rows have another order, and so may a matrix product of
    another number of rows, of which one then and now comes out as a neighbouring number. In fp32 the order of the sums
    is all there is: n terms part by about sqrt(n) units in the last place, some 64 terms here, in some four products
    one after the other."""
    dtype = untiled[0].dtype
    bound = torch.finfo(dtype).eps * (16 if dtype == FULL else 1)
    for one, two in zip(actual, untiled, strict=True):
        assert (one - two).norm() <= bound * two.norm()


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize(("form", "dtype", "dropout"), [("wide", BRAIN, 0.3), ("nf4", HALF, 0.3), ("plain", FULL, 0.0)])
def test_tiles_change_the_order_of_sums_alone(device, half, form, dtype, dropout):
    """With the same dropout, for tiles of any size, the same bits whatever is kept; a tile of all rows is none."""
    problem = Problem(half, device, dtype, adapters=FULL, qk_norm=dtype != HALF, bias=True)
    weights = problem.forms(form)

    def run(**settings):
        torch.manual_seed(0)
        return problem.run(problem.block(weights=weights, attention=attend, dropout=dropout, **settings))

    untiled = run()
    for tile in (13, 39):
        assert_as_untiled(run(tile=tile), untiled)
    first, *others = (run(tile=16, keep=keep) for keep in KEEP)
    assert_as_untiled(first, untiled)
    for expected, actual in [*((first, other) for other in others), (untiled, run(tile=40)), (untiled, run(tile=999))]:
        for one, two in zip(expected, actual, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("half", ["attention", "mlp"])
@pytest.mark.parametrize("shape", [(1, 40), (20, 2), (3, 1), (1, 1), None], ids=str)
def test_tiles_of_any_shape(device, half, shape):
    """Of a part of a sequence, of whole ones, of one row, of rows without a batch, and of gapped ones."""
    problem = Problem(half, device, FULL, qk_norm=True, shape=shape or (1, 40))
    if shape is None:
        problem.x, problem.dy = problem.x[0], torch.cat([problem.dy[0], problem.dy[0]], -1)[:, :H]
    weights = problem.forms("plain")
    untiled = problem.run(problem.block(weights=weights, attention=attend))
    for tile in (1, 8):
        actual = problem.run(problem.block(weights=weights, attention=attend, tile=tile))
        assert_as_untiled(actual, untiled)
    block = problem.block(weights=weights, attention=attend, tile=8)
    x, a, b = problem.leaves(need_x=False)
    grads = torch.autograd.grad(block(x, a, b), [*a, *b], problem.dy)
    without_x, expected = torch.cat([g.flatten() for g in grads]), torch.cat(untiled[2:])
    assert (without_x - expected).norm() <= 1e-5 * expected.norm()
    x = problem.x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(block(x, problem.a, problem.b), x, problem.dy)
    assert (dx.flatten() - untiled[1]).norm() <= 1e-5 * untiled[1].norm()
    with torch.no_grad():
        assert (block(*problem.leaves()) - untiled[0]).norm() <= 1e-6 * untiled[0].norm()
    assert block(problem.x[..., :0, :], problem.a, problem.b).numel() == 0


@pytest.mark.parametrize("rotary", [None, {"rotary_dim": 8, "layout": "interleaved"}], ids=str)
def test_rotations_of_tiles(device, rotary):
    problem = Problem("attention", device, FULL)
    first, second = problem.forms("plain")
    norm, given = problem.settings(attend)
    given |= {"k_norm": ft.Norm(problem.norms[1], 1e-5), **(rotary or {})}
    tables = torch.randn(2, 20, 4, device=device)  # for each sequence its own
    given |= {"cos": tables, "sin": tables.flip(0)} if rotary else {"cos": None, "sin": None}
    untiled, *tiled = (
        problem.run(
            lambda x, a, b, tile=tile: ft.attention_block(x, norm, first, second, a, b, **given, tile=tile, keep="most")
        )
        for tile in (None, 8, 32)
    )
    for actual in tiled:
        assert_as_untiled(actual, untiled)


@pytest.mark.parametrize("keep", ["most", "inputs", "none"])
def test_tiles_of_documents(device, keep):
    """Kernels without a graph, which know the documents; tiles know nothing of them."""
    problem = Problem("attention", device, HALF, adapters=FULL, shape=(1, 40), qk_norm=True)
    weights, plan = problem.forms("wide"), ft.plan_attention(lengths=[13, 27])
    attention = functools.partial(ft.packed_attention, plan=plan)
    untiled = problem.run(problem.block(weights=weights, attention=attention))
    actual = problem.run(problem.block(weights=weights, attention=attention, tile=16, keep=keep))
    assert_as_untiled(actual, untiled)


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_fp8_tiles(device, half):
    problem = Problem(half, device, BRAIN, adapters=FULL)
    weights = problem.forms("fp8")
    untiled = problem.run(problem.block(weights=weights, attention=attend))
    tiled = problem.run(problem.block(weights=weights, attention=attend, tile=16))
    assert_as_untiled(tiled, untiled)


@pytest.mark.parametrize("form", ["wide", "nf4", "plain"])
@pytest.mark.parametrize("ranks", [[4, 4, 4], [4, None, None], [None] * 3], ids=str)
def test_tiles_without_an_answer(device, form, ranks):
    """Then there is nothing to do in forward: backward makes all of it, and the same bits."""
    problem = Problem("mlp", device, HALF, adapters=FULL, ranks=ranks)
    first, second = problem.forms(form)
    norm, given = problem.settings()
    block = functools.partial(ft.MLPBlock, norm, first, second, **given, dropout=0.1)
    results = []
    for answer in (True, False):
        torch.manual_seed(0)
        results.append(problem.run(lambda x, a, b, answer=answer: block(a=a, b=b)(x, answer=answer, tile=16))[1:])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    before, leaves = dispatch.launches.copy(), problem.leaves()
    with Products() as mode:
        block(a=leaves[1], b=leaves[2])(leaves[0], answer=False, tile=16)
    assert not mode.count
    assert not dispatch.launches - before


@pytest.mark.parametrize(("half", "keep", "forward", "backward"), [
    ("mlp", "inputs", 3, 3), ("attention", "most", 4, 4), ("attention", "none", 4, 7),
])  # fmt: skip
def test_a_weight_is_expanded_once_for_all_tiles(device, half, keep, forward, backward):
    problem = Problem(half, device, HALF, adapters=FULL)
    block, leaves = problem.block("nf4", tile=8, keep=keep), problem.leaves()
    before = dispatch.launches.copy()
    y = block(*leaves)
    assert (dispatch.launches - before)["nf4_dequantize"] == forward
    torch.autograd.grad(y, leaves[0], problem.dy)
    assert (dispatch.launches - before)["nf4_dequantize"] == forward + backward


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_a_second_backward_through_tiles(device, half):
    """Of the perceptron nothing is written over."""
    problem = Problem(half, device, FULL)
    leaves = problem.leaves()
    y = problem.block(tile=16)(*leaves)
    (first,) = torch.autograd.grad(y.sum(), leaves[0], retain_graph=True)
    if half == "mlp":
        assert torch.equal(first, torch.autograd.grad(y.sum(), leaves[0])[0])
    else:
        with pytest.raises(RuntimeError, match="attention_block: backward was called a second time"):
            torch.autograd.grad(y.sum(), leaves[0])
    for tile in (0, -8):
        with pytest.raises(ValueError, match=f"tile={tile}; give a number of rows, at least 1, or None"):
            problem.block(tile=tile)(*leaves)


def test_the_peaks_of_tiles_at_real_sizes():
    """Of a layer of Llama 3.1 8B: what grows with the sequence is what attention reads and writes, x, y, and gradients.

    Beside that there is the memory of one tile, and expanded weights once.
    """
    width, inner, ranks, tile = 4096, 14336, 16, 4096
    script = Path(__file__).with_name("tiled_sizes.py")
    cases = {tokens: [f"{half}/nf4/most/{tokens}/{tile}" for half in ("mlp", "attention")] for tokens in (16384, 65536)}
    found = counted(script, *cases[16384], *cases[65536])
    row, h = (-(-(n + r) // 64) * 64 * 2 for n, r in ((width, 2 * ranks), (inner, ranks)))
    low = 2 * 3 * ranks  # of both products' inputs, in bytes a token
    weights = 2 * inner * row + width * h
    for tokens, (mlp, attention) in cases.items():
        forward, backward = found[mlp]
        # In a tile: G and U, and h or its gradient.
        assert forward == pytest.approx(tokens * (2 * width + low) + weights + tile * (4 * inner + h), rel=0.02)
        sums = sums_in_parts(width, inner, ranks)
        assert backward == pytest.approx(tokens * (4 * width + low) + weights + tile * (4 * inner + h) + sums, rel=0.02)
        kept = (width + 1536 * 4) * 2 + 4 * 32 + 4 * 2 * ranks * 2 + 4  # the output, q, k, v, sums, low ranks, 1/rms
        gradients = (width + 1536 * 4) * 2  # of the output or x, and of q, k and v
        fixed = [
            most - tokens * (2 * width + kept + more)
            for most, more in zip(found[attention], (0, gradients), strict=True)
        ]
        assert 0 <= fixed[0] <= fixed[1] <= tile * 2 * (6144 + 2 * width) + 2 * 6144 * row


def test_a_head_in_three_copies_of_the_hidden_states(device):
    """The last norm and a chunked head: beside what the head may use there are x, the normed x or x's gradient, and the
    gradient that waits for backward."""
    rows, width, vocabulary, most = 128, 8 * H, 512, 2**20  # wide, since the interpreter takes its time by the row
    x = torch.randn(rows, width, device=device, dtype=HALF).requires_grad_()
    weight, scale = (
        torch.randn(vocabulary, width, device=device, dtype=HALF),
        torch.ones(width, device=device, dtype=HALF),
    )
    labels = torch.randint(vocabulary, (rows,), device=device)

    def loss(x, labels):
        return ft.linear_cross_entropy(ft.rms_norm(x, scale, 1e-5), weight, labels, max_memory=most)

    torch.autograd.grad(loss(x[:8], labels[:8]), x)
    gc.collect()
    mode = Peak()
    with mode:
        torch.autograd.grad(loss(x, labels), x)
    assert mode.peak <= 2 * x.nbytes + most + 2**16


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["wide", "nf4"])
@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_tiles_on_a_gpu(device, monkeypatch, half, form):
    """The same, and no memory but a tile's beside what is kept and the gradients."""
    monkeypatch.setattr(weight_side, "SMALL", 128)
    attention = functools.partial(ft.packed_attention, plan=ft.plan_attention(lengths=[3000, 5192]))
    problem = Problem(half, device, BRAIN, adapters=FULL, shape=(1, 8192), bias=True, qk_norm=True)
    weights, most = problem.forms(form), []
    untiled = problem.run(problem.block(weights=weights, attention=attention))
    for tile in (1024, 1000, 8191):
        for one, two in zip(
            problem.run(problem.block(weights=weights, attention=attention, tile=tile)), untiled, strict=True
        ):
            assert (one - two).norm() <= 1e-2 * two.norm()
    if half == "attention":
        return
    for rows in (4096, 8192):
        other = problem.cast(BRAIN)
        other.x, other.dy = problem.x[:, :rows], problem.dy[:, :rows]
        block, leaves = other.block(weights=weights, tile=1024), other.leaves()
        other.run(block)
        torch.cuda.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(block(*leaves), [leaves[0], *leaves[1], *leaves[2]], other.dy)
        most.append(torch.cuda.max_memory_allocated() - before)
    assert most[1] - most[0] <= 4096 * 2 * (2 * H + 16 + 16) + 2**21


@pytest.mark.gpu
def test_tiles_in_a_graph(device):
    """A captured forward and backward in tiles is what it is without a graph."""
    problem = Problem("mlp", device, BRAIN, adapters=FULL, shape=(2, 512))
    block, leaves = problem.block(tile=256), problem.leaves()
    every = [leaves[0], *leaves[1], *leaves[2]]

    def step():
        y = block(*leaves)
        return [y, *torch.autograd.grad(y, every, problem.dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for one, two in zip(captured, step(), strict=True):
        assert (one - two).norm() <= 1e-2 * two.norm()
