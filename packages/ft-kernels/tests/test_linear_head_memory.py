"""``linear_cross_entropy`` within its memory bound: what it takes, and that every way of working gives the same."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ft_kernels import dispatch, linear_cross_entropy
from ft_kernels.ops.cross_entropy.reference import Settings
from ft_kernels.ops.linear_head import chunks, plan, products
from ft_kernels.ops.linear_head.plan import (
    Needs,
    Shape,
    held_dtype,
    least_memory,
    plan_rows,
    plan_tiles,
    weight_way,
)
from ft_kernels.ops.linear_head.reference import Head

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("hidden", "weight", "bias", "A", "B")


class Problem:
    """Hidden states, a head with all there is to it, targets and a gradient from above, drawn at random."""

    def __init__(self, n, h, v, dtype, device, *, rank=0, bias=False, trained=NAMES):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        self.tensors = [normal(n, h), normal(v, h, scale=3 * h**-0.5), normal(v) if bias else None]
        self.tensors += [normal(rank, h, scale=h**-0.5), normal(v, rank)] if rank else [None, None]
        self.targets = torch.randint(v, (n,), generator=generator)
        self.targets[torch.rand(n, generator=generator) < 0.3] = -100
        self.targets = self.targets.to(device)
        self.upstream = torch.randn(n, generator=generator).to(device)
        self.trained = [t is not None and name in trained for t, name in zip(self.tensors, NAMES, strict=True)]

    def run(self, function, kwargs, dtype=None):
        """The loss, and the gradients of what is trained."""
        given = [None if t is None else t.detach().to(dtype or t.dtype) for t in self.tensors]
        leaves = [t.requires_grad_() for t, train in zip(given, self.trained, strict=True) if train]
        lora = None if given[3] is None else (*given[3:], 0.75)
        loss = function(given[0], given[1], self.targets, bias=given[2], lora=lora, **kwargs)
        upstream = self.upstream if loss.dim() else self.upstream[0]
        return [loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def plain(hidden, weight, targets, *, bias, lora, softcap, reduction):
    logits = F.linear(hidden, weight, bias) + lora[2] * F.linear(F.linear(hidden, lora[0]), lora[1])
    return F.cross_entropy(softcap * torch.tanh(logits / softcap), targets, reduction=reduction)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kernels", [True, False])
def test_any_amount_of_memory_gives_the_same(device, monkeypatch, dtype, reduction, kernels):
    if not kernels:
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    monkeypatch.setattr(plan, "ENOUGH", 2)
    problem = Problem(16, 6, 90, dtype, device, rank=2, bias=True)
    shape = chunks.shape_of(problem.tensors[0], Head(problem.tensors[1], a=problem.tensors[3]))
    least = least_memory(shape, Needs(*[True] * 5))
    exact = problem.run(plain, {"reduction": reduction, "softcap": 9.0}, torch.float64)
    close = {torch.float16: 3e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    ways = set()
    for memory in (least, least + 4000, 2**30):
        ways.add(weight_way(shape, Needs(*[True] * 5), memory))
        given = problem.run(linear_cross_entropy, {"reduction": reduction, "softcap": 9.0, "max_memory": memory})
        for actual, expected in zip(given, exact, strict=True):
            assert (actual.double() - expected).norm() <= close * expected.norm()
    assert ways == ({"later", "sum", "kept"} if dtype.itemsize == 2 else {"sum"})


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at one time."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                inputs = [t for t in args if isinstance(t, torch.Tensor)]
                if storage not in self.known and all(t.untyped_storage()._cdata != storage._cdata for t in inputs):
                    self.known.add(storage)
                    size = storage.nbytes()
                    self.live += size
                    self.most = max(self.most, self.live)
                    weakref.finalize(storage, self.gone, size)
        return made

    def gone(self, size):
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", [3 * 2**20, 8 * 2**20, 2**28])
@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight"), NAMES])
def test_memory_stays_within_the_bound(monkeypatch, dtype, memory, trained):
    """Of the plain way, on the CPU, where every tensor can be seen to come and go."""
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    monkeypatch.setattr(products, "CAST", 2**14)
    problem = Problem(1024, 96, 3000, dtype, "cpu", rank=4, bias=True)
    hidden, weight, bias, a, b = problem.tensors
    head, needs = Head(weight, bias, a, b), Needs(*(name in trained for name in NAMES))
    numbers = Settings(-100, 0.0, 0.0, 1.0, 0.0)
    gradients = sum(t.nbytes for t, need in zip(problem.tensors, needs, strict=True) if need)
    gc.collect()
    with Live() as live:
        made = chunks.forward_rows(hidden, head, problem.targets, numbers, needs, memory)
        if made.kept is not None:
            one = torch.ones(())
            chunks.weight_from_kept(made.kept, hidden, one, needs, memory, chunks.shape_of(hidden, head))
    assert live.most <= memory + gradients + 2**19
    if trained:
        with Live() as live:
            chunks.backward_rows(
                torch.ones(1024),
                None,
                hidden,
                head,
                problem.targets,
                numbers,
                needs,
                memory,
                made.lses,
                made.rests,
                None,
            )
        assert live.most <= memory + gradients + 2**19


def test_plans():
    """An 8B model's head, 8192 rows, a GiB."""
    shape = Shape(8192, 4096, 128256, 0, torch.bfloat16, True)
    frozen, trained = Needs(hidden=True), Needs(hidden=True, weight=True)
    assert plan_rows(shape, frozen, 2**30) == 2048
    assert held_dtype(shape, 2**30) == torch.float32
    assert [weight_way(shape, trained, gib * 2**30) for gib in (1, 3, 4)] == ["later", "kept", "kept"]
    assert weight_way(shape._replace(rows=2**14), trained, 3 * 2**30) == "sum"
    assert weight_way(shape, frozen, 2**30) is None
    assert plan_tiles(shape, 2**30) == (32128, 8192)
    assert plan_rows(shape._replace(rows=100), frozen, 2**30) == 100
    long = shape._replace(rows=2**17)
    assert held_dtype(long, 2**30) == torch.bfloat16
    assert plan_rows(shape, frozen, least_memory(shape, frozen)) >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_memory_on_the_gpu(device, trained):
    problem = Problem(4096, 2048, 64000, torch.bfloat16, device, trained=trained)
    problem.run(linear_cross_entropy, {})  # what the matrix library keeps for itself is allocated
    for memory in (2**28, 2**29, 2**30):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(linear_cross_entropy, {"max_memory": memory})
        gradients = sum(t.nbytes for t, train in zip(problem.tensors, problem.trained, strict=True) if train)
        assert torch.cuda.max_memory_allocated() - before - gradients <= memory + 2**25


@pytest.mark.parametrize(
    ("trained", "dtype", "memory"),
    [
        (("hidden",), torch.float32, 2**16),
        (NAMES, torch.float32, 2**16),
        (("hidden", "weight"), torch.bfloat16, 2**16),  # which is kept
        (("weight",), torch.bfloat16, 2**11),  # later
    ],
)
def test_opcheck(device, trained, dtype, memory):
    from ft_kernels.ops.linear_head.autograd import linear_head_op, linear_head_sum_op

    rank = 2 if trained == NAMES else 0
    problem = Problem(7, 16, 40, dtype, device, rank=rank, bias=rank > 0, trained=trained)
    for tensor, train in zip(problem.tensors, problem.trained, strict=True):
        if train:
            tensor.requires_grad_()
    tensors = problem.tensors
    numbers = (0.5, -100, 0.1, 30.0, 1.0, 1e-4, 1.0, memory)
    torch.library.opcheck(linear_head_sum_op, (*tensors, problem.targets, *numbers, problem.trained))
    if dtype == torch.float32:
        torch.library.opcheck(linear_head_op, (*tensors, problem.targets, *numbers, False, False, trained != NAMES))
