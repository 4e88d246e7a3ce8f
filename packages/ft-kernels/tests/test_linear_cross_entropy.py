from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import dispatch, linear_cross_entropy, linear_logprob, nn
from ft_kernels.ops.cross_entropy.reference import Settings
from ft_kernels.ops.linear_head.plan import (
    Needs,
    Shape,
    least_memory,
)
from ft_kernels.ops.linear_head.reference import Head, linear_head_rows

FORWARD, BACKWARD, SCALED = "cross_entropy_forward", "cross_entropy_backward", "linear_head_scaled"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("hidden", "weight", "bias", "A", "B")


def plain(
    hidden, weight, targets, *, bias=None, lora=None, label_smoothing=0.0, softcap=None, logit_scale=1.0, z_loss=0.0,
    reduction="mean",
):  # fmt: skip
    """What a user would write with torch alone: logits in the model's dtype, the loss in at least fp32."""
    logits = F.linear(hidden, weight, bias)
    if lora is not None:
        logits = logits + lora[2] * F.linear(F.linear(hidden, lora[0]), lora[1])
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    flat = targets.flatten()
    loss = F.cross_entropy(logits, flat, label_smoothing=label_smoothing, reduction="none")
    loss = loss + z_loss * torch.where(flat == -100, 0, logits.logsumexp(-1).square())
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (flat != -100).sum()


def laid_out(targets, layout):
    """The same targets in other memory, or one of them everywhere; what lies between is another class."""
    if layout == "expanded":
        return targets.max().expand(targets.shape)
    if layout == "apart":  # as labels[..., -1]
        return torch.stack([(targets + 1).clamp(0), targets, targets * 0], -1)[..., 1]
    if layout == "turned" and targets.dim() > 1:
        return targets.transpose(0, 1).contiguous().transpose(0, 1)
    return targets


LAYOUTS = ["plain", "apart", "turned", "expanded"]


class Problem:
    """Hidden states, a head and targets, drawn at random."""

    def __init__(
        self, n, h, v, dtype, device, *, seed=0, spread=3.0, rank=0, bias=False, ignored=0.3, trained=NAMES,
        layout="plain",
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        self.tensors = [normal(*n, h) if isinstance(n, tuple) else normal(n, h), normal(v, h, scale=spread / h**0.5)]
        self.tensors += [normal(v) if bias else None]
        self.tensors += [normal(rank, h, scale=h**-0.5), normal(v, rank)] if rank else [None, None]
        shape = self.tensors[0].shape[:-1]
        self.targets = torch.randint(v, shape, generator=generator)
        self.targets[torch.rand(shape, generator=generator) < ignored] = -100
        self.targets = laid_out(self.targets.to(device), layout)
        self.upstream = torch.randn(shape, generator=generator).to(device)
        self.trained = [t is not None and name in trained for t, name in zip(self.tensors, NAMES, strict=True)]

    def run(self, function, kwargs, dtype=None):
        """The loss, and the gradients of what is trained."""
        given = [None if t is None else t.detach().to(dtype or t.dtype) for t in self.tensors]
        for tensor, train in zip(given, self.trained, strict=True):
            if train:
                tensor.requires_grad_()
        hidden, weight, bias, a, b = given
        lora = None if a is None else (a, b, 0.75)
        loss = function(hidden, weight, self.targets, bias=bias, lora=lora, **kwargs)
        upstream = self.upstream if loss.dim() else self.upstream.flatten()[0]
        leaves = [t for t, train in zip(given, self.trained, strict=True) if train]
        return [loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    def judge(self, exact_enough, in_other_orders, kwargs, **ours):
        actual = self.run(linear_cross_entropy, {**kwargs, **ours})
        eager = zip(*(self.run(f, kwargs) for f in in_other_orders(plain, self.tensors[0].dtype)), strict=True)
        exact = self.run(plain, kwargs, torch.float64)
        names = ["loss", *(n for n, train in zip(NAMES, self.trained, strict=True) if train)]
        assert actual[0].dtype == torch.float32
        for name, *three in zip(names, actual, eager, exact, strict=True):
            if name == "loss" and not three[0].dim():
                continue  # one number: a matter of luck; the rows' losses are judged with reduction="none"
            assert name == "loss" or three[0].dtype == self.tensors[0].dtype
            exact_enough(name, *three)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.1, 1.0]),
        "softcap": st.sampled_from([5.0, 30.0]),
        "logit_scale": st.sampled_from([0.1, 2.0]),
        "z_loss": st.sampled_from([1e-4, 0.1]),
    },
)
TRAINED = [("hidden",), ("hidden", "weight"), ("weight",), ("hidden", "A", "B"), NAMES]


@settings(max_examples=7)
@given(
    h=st.integers(48, 96), v=st.integers(100, 500), dtype=st.sampled_from(DTYPES), options=OPTIONS,
    rank=st.sampled_from([0, 0, 5]), bias=st.booleans(), trained=st.sampled_from(TRAINED),
    reduction=st.sampled_from(["none", "mean"]), chunked=st.booleans(),
    spread=st.sampled_from([0.3, 3.0]), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(
    h=64, v=300, dtype=torch.float16, options={}, rank=0, bias=False, trained=("hidden",), reduction="none",
    chunked=True, spread=3.0, layout="plain", seed=0,
)  # fmt: skip
@example(
    h=64, v=300, dtype=torch.bfloat16, options={}, rank=4, bias=True, trained=NAMES, reduction="mean",
    chunked=True, spread=0.3, layout="apart", seed=0,
)  # fmt: skip
def test_exact(  # of sizes at which the products' own errors are no matter of luck
    device,
    exact_enough,
    in_other_orders,
    launched,
    h,
    v,
    dtype,
    options,
    rank,
    bias,
    trained,
    reduction,
    chunked,
    spread,
    layout,
    seed,
):
    problem = Problem(
        (2, 16), h, v, dtype, device, seed=seed, spread=spread, rank=rank, bias=bias, trained=trained, layout=layout
    )  # fmt: skip
    if not any(problem.trained):
        problem.trained[0] = True
    ours = {}
    if chunked and dtype != torch.float32:  # in fp32, more sums mean more roundings
        least = least_memory(Shape(32, h, v, rank, dtype, True), Needs(*problem.trained))
        ours["max_memory"] = 2 * least if "weight" not in trained else max(2 * least, 4 * v * h)
    before = dispatch.launches.copy()
    problem.judge(exact_enough, in_other_orders, {**options, "reduction": reduction}, **ours)
    assert (dispatch.launches - before)[FORWARD]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_targets_in_any_layout(device, layout, dtype):
    """The last token of each sequence, say: the kernels would read its neighbours."""
    problem = Problem((3, 9), 16, 33, torch.float32, device, trained=("hidden", "weight"), ignored=0.1)
    problem.targets = laid_out(problem.targets.to(dtype), layout)
    for reduction in ("mean", "none"):
        actual = problem.run(linear_cross_entropy, {"reduction": reduction})
        targets, problem.targets = problem.targets, problem.targets.long()
        exact = problem.run(plain, {"reduction": reduction}, torch.float64)
        problem.targets = targets
        torch.testing.assert_close([t.double() for t in actual], exact, rtol=1e-5, atol=1e-6)


def test_which_kernels_run(device, launched):
    problem = Problem(12, 16, 50, torch.float32, device, trained=("hidden",))
    with launched(FORWARD):
        linear_cross_entropy(problem.tensors[0], problem.tensors[1], problem.targets)
    with launched(FORWARD, SCALED):  # the gradient is made in forward
        problem.run(linear_cross_entropy, {"reduction": "none"})
        problem.run(linear_cross_entropy, {"reduction": "mean"})
    problem.trained[1] = True
    with launched(FORWARD, SCALED):
        problem.run(linear_cross_entropy, {"reduction": "sum"})
    with launched(FORWARD, BACKWARD, SCALED):
        problem.run(linear_cross_entropy, {"reduction": "none"})


def test_backward_twice(device):
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(12, 16, 50, dtype, device)
        hidden, weight = (t.requires_grad_() for t in problem.tensors[:2])
        loss = linear_cross_entropy(hidden, weight, problem.targets)
        first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
        kept = [t.clone() for t in first]
        second = torch.autograd.grad(loss * 3, (hidden, weight))
        for a, b, c in zip(first, second, kept, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight"), NAMES])
def test_a_gradient_of_the_gradient_is_refused(device, dtype, trained):
    """The gradient was made in forward and would come without a graph: a penalty on it would do nothing."""
    problem = Problem(12, 16, 50, dtype, device, rank=2, bias=True, trained=trained)
    tensors = [t.requires_grad_(train) for t, train in zip(problem.tensors, problem.trained, strict=True)]
    leaves = [t for t in tensors if t.requires_grad]
    hidden, weight, bias, a, b = tensors
    given = {"bias": bias, "lora": (a, b, 0.5)}
    ways = {
        "mean": lambda: linear_cross_entropy(hidden, weight, problem.targets, **given),
        "later": lambda: linear_cross_entropy(hidden, weight, problem.targets, **given, max_memory=2**14),
        "none": lambda: linear_cross_entropy(hidden, weight, problem.targets, **given, reduction="none").sum(),
        "logprob": lambda: linear_logprob(hidden, weight, problem.targets, **given).sum(),
        "entropy": lambda: -linear_logprob(hidden, weight, problem.targets, **given, entropy=True).entropy.sum(),
    }
    for way in ways.values():
        with pytest.raises(RuntimeError, match="the gradient cannot be differentiated again"):
            torch.autograd.grad(way(), leaves, create_graph=True)


@pytest.mark.parametrize("kernels", [True, False])
def test_all_rows_ignored(device, monkeypatch, kernels):
    if not kernels:
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(5, 16, 30, dtype, device, ignored=2.0, rank=2, bias=True)
        for reduction in ("mean", "sum", "none"):
            loss, *gradients = problem.run(linear_cross_entropy, {"reduction": reduction})
            if reduction == "mean":
                assert loss.isnan()
            else:
                assert not loss.any()
            assert not any(g.any() for g in gradients)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, about the nan that is meant
def test_an_ignored_row_may_hold_anything_and_a_wrong_target_shows(device):
    problem = Problem(6, 16, 30, torch.float32, device, ignored=0.0, trained=("hidden",))
    problem.targets[2] = -100
    problem.tensors[0][2] = math.nan
    loss, gradient = problem.run(linear_cross_entropy, {})
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[2].any()
    problem.targets[3] = 30
    losses, gradient = problem.run(linear_cross_entropy, {"reduction": "none"})
    assert losses.isnan().tolist() == gradient.isnan().all(-1).tolist() == [row == 3 for row in range(6)]


def test_fp16_gradients_are_not_cut_off(device):
    """Under a mean over many rows, in fp16, most of a logit's gradient is below the smallest number; not here."""
    problem = Problem(64, 32, 400, torch.float16, device, spread=0.3, trained=("hidden", "weight"))
    problem.upstream.fill_(2.0**-8)
    for kwargs in ({"reduction": "mean"}, {"reduction": "none"}):
        actual = problem.run(linear_cross_entropy, kwargs)
        exact = problem.run(plain, kwargs, torch.float64)
        for made, expected in zip(actual[1:], exact[1:], strict=True):
            smallest = 2.0**-25 * made.numel() ** 0.5  # what storing the result in fp16 may cost
            assert (made.double() - expected).norm() <= 2e-3 * expected.norm() + smallest


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("z_loss", [1e-4, 1.0, 20.0])
def test_a_large_z_loss_fits_into_fp16(device, monkeypatch, kernels, z_loss):
    """It makes the logits' gradient steeper by 1 + 2 · z_loss · logsumexp, here up to 2000."""
    if not kernels:
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    problem = Problem(24, 64, 300, torch.float16, device, spread=10.0, ignored=0.0, trained=("hidden", "weight"))
    problem.upstream.fill_(1.0)
    for kwargs in ({"reduction": "mean"}, {"reduction": "none"}, {"softcap": 30.0}, {"logit_scale": 0.1}):
        actual = problem.run(linear_cross_entropy, {**kwargs, "z_loss": z_loss})
        exact = problem.run(plain, {**kwargs, "z_loss": z_loss}, torch.float64)
        for made, expected in zip(actual[1:], exact[1:], strict=True):
            assert made.isfinite().all()
            # One rounding of the logits, one of their gradient and one of the result, in fp16.
            assert (made.double() - expected).norm() <= 1e-2 * expected.norm()


def test_views_and_layouts(device):
    problem = Problem((3, 9), 16, 33, torch.float32, device, trained=())
    hidden, weight = problem.tensors[:2]
    expected = plain(hidden[:, :-1], weight, problem.targets[:, 1:])
    for states, head in (
        (hidden, weight),
        (hidden.transpose(0, 2).contiguous().transpose(0, 2), weight.t().contiguous().t()),
        (torch.cat([hidden, hidden], -1)[..., :16], torch.cat([weight, weight], -1)[:, :16]),
    ):
        leaf, head = states.detach().requires_grad_(), head.detach().requires_grad_()
        loss = linear_cross_entropy(leaf[:, :-1], head, problem.targets[:, 1:].int())
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert leaf.grad.isfinite().all()
        assert head.grad.isfinite().all()
    one = linear_cross_entropy(hidden[0, 0], weight, torch.tensor(3, device=device))
    torch.testing.assert_close(one, F.cross_entropy(weight @ hidden[0, 0], torch.tensor(3, device=device)))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty(device, launched, shape):
    hidden = torch.randn(*shape, 8, device=device, requires_grad=True)
    weight = torch.randn(20, 8, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert gradients[0].shape == hidden.shape
        assert not gradients[1].any()
    assert linear_cross_entropy(hidden, weight, targets).isnan()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(options, reduction):
    """Of the chunked way, five rows of memory at a time, and of the reference, which is differentiable twice."""
    problem = Problem(8, 4, 7, torch.float64, "cpu", rank=2, bias=True)
    leaves = [t.requires_grad_() for t in problem.tensors]

    def chunked(hidden, weight, bias, a, b):
        return linear_cross_entropy(
            hidden, weight, problem.targets, bias=bias, lora=(a, b, 0.5), reduction=reduction, max_memory=3000,
            **options,
        )  # fmt: skip

    numbers = Settings(
        -100, options.get("label_smoothing", 0.0), options.get("softcap", 0.0), options.get("logit_scale", 1.0),
        options.get("z_loss", 0.0),
    )  # fmt: skip

    def reference(hidden, weight, bias, a, b):
        losses, _ = linear_head_rows(hidden, Head(weight, bias, a, b, 0.5), problem.targets, numbers)
        return losses if reduction == "none" else losses.sum() / (problem.targets != -100).sum()

    assert torch.autograd.gradcheck(chunked, leaves)
    torch.testing.assert_close(chunked(*leaves), reference(*leaves))
    if reduction == "none":
        assert torch.autograd.gradcheck(reference, leaves)
        assert torch.autograd.gradgradcheck(lambda hidden: reference(hidden, *leaves[1:]).sum(), leaves[0])


@pytest.mark.gpu
def test_cuda_graph(device):
    problem = Problem(300, 128, 1000, torch.bfloat16, device)
    hidden, weight = (t.requires_grad_() for t in problem.tensors[:2])

    def step():
        loss = linear_cross_entropy(hidden, weight, problem.targets, max_memory=2**20)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    for made, expected in zip(replayed, step(), strict=True):
        torch.testing.assert_close(made, expected)


@pytest.mark.gpu
def test_does_not_wait_for_the_gpu(device):
    problem = Problem(300, 128, 1000, torch.float16, device, rank=4, bias=True)
    for reduction in ("mean", "none"):
        problem.run(linear_cross_entropy, {"reduction": reduction, "max_memory": 2**20})
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.run(linear_cross_entropy, {"reduction": reduction, "max_memory": 2**20})
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits_at_a_time(device):
    problem = Problem(17000, 64, 131072, torch.bfloat16, device, spread=1.0, trained=("hidden",))
    losses, gradient = problem.run(linear_cross_entropy, {"reduction": "none", "max_memory": 2**33})
    for tensor in (losses, gradient):
        assert tensor.isfinite().all()
    problem.tensors[0], problem.targets, problem.upstream = (
        t[-4:] for t in (problem.tensors[0], problem.targets, problem.upstream)
    )
    exact = problem.run(plain, {"reduction": "none"}, torch.float64)
    torch.testing.assert_close(losses[-4:].double(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradient[-4:].double(), exact[1], rtol=2e-2, atol=1e-3)


def test_autocast(device):
    problem = Problem(20, 16, 50, torch.float32, device, rank=2, bias=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, *gradients = problem.run(linear_cross_entropy, {})
        expected = problem.run(plain, {})
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close([loss, *gradients], expected, rtol=3e-2, atol=3e-3)


def test_bias_and_update_of_another_dtype(device):
    problem = Problem(20, 16, 50, torch.bfloat16, device, rank=2, bias=True)
    problem.tensors[2:] = [t.float() for t in problem.tensors[2:]]
    _, *gradients = problem.run(linear_cross_entropy, {})
    exact = problem.run(plain, {}, torch.float64)[1:]
    for actual, expected, tensor in zip(gradients, exact, problem.tensors, strict=True):
        assert actual.dtype == tensor.dtype
        assert (actual.double() - expected).norm() <= 0.03 * expected.norm()


def test_compile(device):
    layer = nn.LinearCrossEntropyLoss(label_smoothing=0.1)
    problem = Problem((2, 9), 16, 50, torch.float32, device, trained=("hidden", "weight"))
    hidden, weight = (t.requires_grad_() for t in problem.tensors[:2])
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    loss = compiled(hidden, weight, problem.targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = layer(hidden, weight, problem.targets)
    torch.testing.assert_close([loss, *gradients], [expected, *torch.autograd.grad(expected, (hidden, weight))])


def test_layer():
    layer = nn.LinearCrossEntropyLoss(ignore_index=0, softcap=3.0, reduction="sum", max_memory=2**20)
    assert list(layer.state_dict()) == []
    hidden, weight = torch.randn(2, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    targets = torch.tensor([0, 4])
    expected = linear_cross_entropy(hidden, weight, targets, ignore_index=0, softcap=3.0, reduction="sum")
    torch.testing.assert_close(layer(hidden, weight, targets), expected)
    assert "softcap=3.0" in repr(layer)
    assert "max_memory=1048576" in repr(layer)


HIDDEN, WEIGHT, TARGETS = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": HIDDEN.long()}, TypeError, "hidden has dtype torch.int64; use a floating-point"),
        ({"weight": WEIGHT.half()}, TypeError, "hidden has dtype torch.float32, weight torch.float16; cast one"),
        ({"targets": HIDDEN[:, 0]}, TypeError, "targets have dtype torch.float32; use class numbers"),
        ({"targets": TARGETS[:1]}, ValueError, r"hidden \[2, 3\] and targets \[1\] do not fit"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"hidden \[2, 3\] and weight \[5, 4\] do not fit"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "H and V from 1"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\]; weight needs \[5\]"),
        ({"lora": (torch.zeros(2, 3), torch.zeros(5, 1), 1.0)}, ValueError, r"use \[r, 3\] and \[5, r\]"),
        ({"targets": TARGETS.to("meta")}, ValueError, "hidden is on cpu, targets on meta"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5; allowed is 0 to 1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0; allowed is a positive number"),
        ({"softcap": math.inf}, ValueError, "softcap=inf; allowed is a positive number"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale=nan; allowed is a positive number"),
        ({"z_loss": math.nan}, ValueError, "z_loss=nan; allowed is 0 or more"),
        ({"lora": (torch.zeros(2, 3), torch.zeros(5, 2))}, TypeError, r"lora has 2 items; give three, \(A \[r, H\]"),
        ({"max_memory": 1e9}, TypeError, r"max_memory=1000000000.0; give a whole number of bytes"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale=0.0; allowed is a positive number"),
        ({"z_loss": -1.0}, ValueError, "z_loss=-1.0; allowed is 0 or more"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'; allowed are"),
        ({"max_memory": 10}, ValueError, "max_memory=10 bytes is too little .* give at least"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **arguments})
