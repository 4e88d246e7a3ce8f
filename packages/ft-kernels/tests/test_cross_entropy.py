from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import cross_entropy, dispatch, nn

FORWARD, BACKWARD = "cross_entropy_forward", "cross_entropy_backward"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(
    logits,
    targets,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    logit_scale=1.0,
    z_loss=0.0,
    reduction="mean",
):
    """What a user would write with torch alone, in the logits' own dtype."""
    z = logits * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    flat, classes = targets.flatten(), z.flatten(0, -2)
    loss = F.cross_entropy(
        classes, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    ) + z_loss * torch.where(flat == ignore_index, 0, classes.logsumexp(-1).square())
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (flat != ignore_index).sum()


def both(function, logits, targets, upstream, kwargs):
    logits = logits.detach().requires_grad_()
    loss = function(logits, targets, **kwargs)
    return loss, torch.autograd.grad(loss, logits, upstream.to(loss.dtype).view(loss.shape))[0]


def judge(exact_enough, launched, logits, targets, kwargs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(targets.shape, generator=generator).to(logits.device, logits.dtype)
    with launched(FORWARD, BACKWARD):
        actual = both(cross_entropy, logits, targets, upstream, dict(kwargs, reduction="none"))
    eager = both(plain, logits, targets, upstream, dict(kwargs, reduction="none"))
    if not eager[0].isfinite().all():  # fp16 overflows in torch's own sums; a user would then write float()
        eager = both(plain, logits.float(), targets, upstream.float(), dict(kwargs, reduction="none"))
    exact = both(plain, logits.double(), targets, upstream.double(), dict(kwargs, reduction="none"))
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == logits.dtype
    exact_enough("loss", actual[0], eager[0], exact[0])
    exact_enough("gradient", actual[1], eager[1], exact[1])


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.1, 1.0]),
        "softcap": st.sampled_from([5.0, 30.0]),
        "logit_scale": st.sampled_from([0.1, 2.0]),
        "z_loss": st.sampled_from([1e-4, 0.1]),
    },
)


@settings(max_examples=12)
@given(
    vocabulary=st.integers(1, 1500), dtype=st.sampled_from(DTYPES), options=OPTIONS,
    layout=st.sampled_from(["contiguous", "shifted", "transposed"]), spread=st.sampled_from([0.1, 3.0, 20.0]),
    ignored=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(vocabulary=1, dtype=torch.float32, options={}, layout="contiguous", spread=3.0, ignored=0.0, seed=0)
@example(vocabulary=2, dtype=torch.float32, options={}, layout="contiguous", spread=3.0, ignored=0.3, seed=0)
@example(
    vocabulary=3, dtype=torch.bfloat16, options={"softcap": 5.0}, layout="shifted", spread=9.0, ignored=0.3, seed=0
)
@example(vocabulary=49152, dtype=torch.float32, options={}, layout="contiguous", spread=3.0, ignored=0.0, seed=0)
def test_exact(device, exact_enough, launched, vocabulary, dtype, options, layout, spread, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    # Enough rows that the norm of their errors says something of the method and not of one lucky rounding.
    shape = (2, 12, vocabulary) if vocabulary < 10000 else (2, 5, vocabulary)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype).to(device)
    if layout == "shifted":
        logits = logits[:, :-1]
    elif layout == "transposed":
        logits = logits.transpose(0, 2).contiguous().transpose(0, 2)
    targets = torch.randint(vocabulary, logits.shape[:-1], generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = -100
    judge(exact_enough, launched, logits, targets.to(device), options, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 20.0, "logit_scale": 0.5, "z_loss": 1e-3}])
def test_rows_longer_than_a_block(device, exact_enough, launched, monkeypatch, dtype, options):
    from ft_kernels.ops.cross_entropy import kernels

    monkeypatch.setattr(kernels, "MAX_BLOCK", 64)
    monkeypatch.setattr(kernels, "READING", (1, 1))  # tiles of 256 elements
    monkeypatch.setattr(kernels, "IN_FP64", (1, 2))
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(8, 1100, generator=generator) * 4).to(device, dtype)
    targets = torch.randint(1100, (8,), generator=generator)
    targets[:3] = torch.tensor([0, 600, 1099])  # in the first, an inner and the unfilled tile
    judge(exact_enough, launched, logits, targets.to(device), options)
    if options:
        return
    # As many columns as tiles fill, and rows that no 16-byte load can start at.
    judge(exact_enough, launched, logits[:, :1024].contiguous(), targets.clamp(max=1023).to(device), options)
    judge(exact_enough, launched, logits[:, 1:1000], targets.clamp(max=998).to(device), options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows(device, exact_enough, launched, dtype):
    """Where p(target) is all but 1, log p and 1 − p cancel unless they are computed from what the others add up to."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, 50, generator=generator)
    targets = torch.randint(50, (64,), generator=generator)
    logits[torch.arange(64), targets] += torch.linspace(10, 40, 64)
    logits = logits.to(device, dtype)
    targets = targets.to(device)
    with launched(FORWARD):
        losses = cross_entropy(logits, targets, reduction="none")
    wide = logits.double()
    others = torch.where(F.one_hot(targets, 50).bool(), -math.inf, wide).logsumexp(-1)
    exact = torch.log1p((others - wide.gather(-1, targets[:, None])[:, 0]).exp())
    # Relative, row by row: a few fp32 roundings, and exp's error at arguments down to −40 (half an ulp of 40 is 2e-6).
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(device, exact_enough, launched, reduction, dtype):
    """24 inputs at once: the rule over one number alone would be a matter of luck."""
    generator = torch.Generator().manual_seed(3)
    results: list[list[torch.Tensor]] = [[], [], []]
    with launched(FORWARD, BACKWARD):
        for _ in range(24):
            logits = torch.randn(6, 400, generator=generator).to(device, dtype)
            targets = torch.randint(400, (6,), generator=generator).to(device)
            targets[:3] = -100
            one = torch.ones((), device=device)
            for into, function, given_logits in zip(
                results, (cross_entropy, plain, plain), (logits, logits, logits.double()), strict=True
            ):
                into.append(
                    torch.cat(
                        [t.flatten() for t in both(function, given_logits, targets, one, {"reduction": reduction})]
                    )
                )
    actual, eager, exact = (torch.stack(r) for r in results)
    exact_enough("loss", actual[:, 0], eager[:, 0], exact[:, 0])
    exact_enough("gradient", actual[:, 1:].to(dtype), eager[:, 1:], exact[:, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 20.0, "logit_scale": 0.5, "z_loss": 1e-3}])
def test_the_reference_is_exact_too(exact_enough, monkeypatch, dtype, options):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(256, 300, generator=generator) * 4).to(dtype)
    targets = torch.randint(300, (256,), generator=generator)
    kwargs = {**options, "reduction": "none"}
    upstream = torch.randn(256, generator=generator).to(dtype)
    actual, eager = (both(function, logits, targets, upstream, kwargs) for function in (cross_entropy, plain))
    exact = both(plain, logits.double(), targets, upstream.double(), kwargs)
    exact_enough("loss", actual[0], eager[0], exact[0])
    exact_enough("gradient", actual[1], eager[1], exact[1])


def test_same_as_torch_in_float64():
    logits = torch.randn(4, 6, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (4, 6))
    targets[1] = 7
    for reduction in ("mean", "sum", "none"):
        for options in ({}, {"label_smoothing": 0.2}, {"softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1}):
            kwargs = dict(options, ignore_index=7, reduction=reduction)
            torch.testing.assert_close(cross_entropy(logits, targets, **kwargs), plain(logits, targets, **kwargs))


def test_all_rows_ignored_is_as_in_torch(device, launched):
    logits = torch.randn(3, 9, device=device, requires_grad=True)
    targets = torch.full((3,), -100, device=device)
    for reduction in ("sum", "mean", "none"):
        with launched(FORWARD, BACKWARD):
            loss = cross_entropy(logits, targets, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction=reduction), equal_nan=True)
        assert torch.equal(gradient, torch.zeros_like(logits))
    wide = logits.detach().double().requires_grad_()
    mean = cross_entropy(wide, targets)
    assert mean.isnan()
    assert torch.equal(torch.autograd.grad(mean, wide)[0], torch.zeros_like(wide))
    assert cross_entropy(wide, targets, reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ignored_row_may_hold_anything(device, dtype):
    logits = torch.randn(3, 9, device=device, dtype=dtype)
    logits[1] = math.nan
    logits.requires_grad_()
    targets = torch.tensor([2, -100, 4], device=device)
    loss = cross_entropy(logits, targets, z_loss=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: infinities are the point here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_and_infinite_logits_are_as_in_torch(device, dtype):
    inf = math.inf
    logits = torch.tensor(
        [[1, -inf, 2, 0], [-inf, 1, 2, 0], [-inf, -inf, -inf, 5], [-inf] * 4, [inf, 1, 2, 3], [1, math.nan, 0, 0],
         [-3e38, 3e38, 0, 0]], dtype=dtype, device=device, requires_grad=True,
    )  # fmt: skip
    targets = torch.tensor([0, 0, 3, 1, 2, 3, 1], device=device)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        loss = function(logits, targets, reduction="none")
        finite = torch.autograd.grad(loss[[0, 1, 2, 6]].sum(), logits)[0]
        results.append((loss, finite[[0, 1, 2, 6]]))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, about the nan that is meant
def test_a_target_outside_the_vocabulary_shows(device, launched):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    targets = torch.tensor([1, 5, -1], device=device)
    with launched(FORWARD, BACKWARD):
        losses = cross_entropy(logits, targets, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isnan().tolist() == [False, True, True]
    assert gradient.isnan().all(-1).tolist() == [False, True, True]
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
        cross_entropy(logits.cpu().double(), targets.cpu())


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty(device, launched, shape):
    logits = torch.randn(shape, device=device, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    with launched():
        loss = cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        assert cross_entropy(logits, targets).isnan()
        assert cross_entropy(logits, targets, reduction="none").shape == shape[:-1]
    assert loss == 0
    assert logits.grad.shape == shape


def test_one_row_and_small_integer_targets(device, launched):
    logits = torch.randn(9, device=device)
    with launched(FORWARD):
        loss = cross_entropy(logits, torch.tensor(3, dtype=torch.int32, device=device))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(3, device=device)))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, launched):
    logits = torch.empty(16388, 131072, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    targets = torch.randint(131072, (16388,), device=device)
    with launched(FORWARD, BACKWARD):
        losses = cross_entropy(logits, targets, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    last = logits[-3:].detach().double().requires_grad_()
    exact = cross_entropy(last, targets[-3:], reduction="none")
    torch.testing.assert_close(losses[-3:].double(), exact, rtol=1e-6, atol=0)
    exact_gradient = torch.autograd.grad(exact.sum(), last)[0]
    torch.testing.assert_close(gradient[-3:].double(), exact_gradient, rtol=2**-8, atol=1e-9)
    assert torch.isfinite(gradient).all()


@pytest.mark.gpu
def test_cuda_graph(device, launched):
    logits = torch.randn(8, 1000, device=device, requires_grad=True)
    targets = torch.randint(1000, (8,), device=device)

    def step():
        loss = cross_entropy(logits, targets)
        return loss, torch.autograd.grad(loss, logits)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with launched(FORWARD, BACKWARD), torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    torch.testing.assert_close(replayed, step(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 2.0, "logit_scale": 0.5, "z_loss": 0.1}])
def test_gradcheck_of_the_reference(options):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 5, 0])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, **options), logits)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, reduction="none", **options), logits)


def test_opcheck(device, launched):
    from ft_kernels.ops.cross_entropy.autograd import cross_entropy_op

    logits = torch.randn(2, 3, 50, device=device, requires_grad=True)
    targets = torch.tensor([[1, -100, 49], [0, 2, 2]], device=device)
    with launched(FORWARD, BACKWARD):
        torch.library.opcheck(cross_entropy_op, (logits, targets, -100, 0.1, 30.0, 1.0, 1e-4))


def test_compile(device, launched):
    layer = nn.CrossEntropyLoss(label_smoothing=0.1)
    logits = torch.randn(2, 3, 50, device=device, requires_grad=True)
    targets = torch.tensor([[1, -100, 49], [0, 2, 2]], device=device)
    with launched(FORWARD, BACKWARD):
        compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        loss = compiled(logits, targets)
        (gradient,) = torch.autograd.grad(loss, logits)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_layer():
    layer = nn.CrossEntropyLoss(ignore_index=0, softcap=3.0, reduction="sum")
    assert list(layer.state_dict()) == []
    logits, targets = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 4])
    torch.testing.assert_close(
        layer(logits, targets), cross_entropy(logits, targets, ignore_index=0, softcap=3.0, reduction="sum")
    )
    assert "ignore_index=0, label_smoothing=0.0, softcap=3.0" in repr(layer)


LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": LOGITS.long()}, TypeError, "logits have dtype torch.int64; use a floating-point"),
        ({"targets": LOGITS[:, 0]}, TypeError, "targets have dtype torch.float32; use class numbers"),
        ({"targets": TARGETS[:1]}, ValueError, r"logits \[2, 3\] and targets \[1\] do not fit"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "have no classes"),
        ({"targets": TARGETS.to("meta")}, ValueError, "logits are on cpu, targets on meta"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5; allowed is 0 to 1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0; allowed is a positive number"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf; allowed is a positive number"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale=0.0; allowed is a positive number"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale=nan; allowed is a positive number"),
        ({"z_loss": -1.0}, ValueError, "z_loss=-1.0; allowed is 0 or more"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'; allowed are"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(**{"logits": LOGITS, "targets": TARGETS, **arguments})
