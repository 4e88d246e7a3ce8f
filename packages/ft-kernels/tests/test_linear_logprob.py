from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import dispatch, linear_logprob
from ft_kernels.functional import TokenLogProbs

FORWARD, BACKWARD, SCALED = "cross_entropy_forward", "cross_entropy_backward", "linear_head_scaled"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def plain(hidden, weight, targets, *, bias=None, lora=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """Log-probabilities and entropies as a user would write them: logits in the model's dtype, the rest in fp32."""
    logits = F.linear(hidden, weight, bias)
    if lora is not None:
        logits = logits + lora[2] * F.linear(F.linear(hidden, lora[0]), lora[1])
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax((logits / temperature).to(torch.promote_types(logits.dtype, torch.float32)), -1)
    valid = targets != -100
    picked = log_p.gather(-1, torch.where(valid, targets, 0)[..., None])[..., 0]
    return torch.where(valid, picked, 0), torch.where(valid, -(log_p.exp() * log_p).sum(-1), 0)


class Problem:
    """Hidden states, a head, targets and gradients from above, drawn at random."""

    def __init__(self, n, h, v, dtype, device, *, seed=0, spread=3.0, rank=0, bias=False, trained=1, apart=1):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        self.tensors = [normal(n, h), normal(v, h, scale=spread / h**0.5), normal(v) if bias else None]
        self.tensors += [normal(rank, h, scale=h**-0.5), normal(v, rank)] if rank else [None, None]
        self.targets = torch.randint(v, (n,), generator=generator)
        self.targets[torch.rand(n, generator=generator) < 0.2] = -100
        # Each target in a row of so many, of which the others are other classes.
        others = torch.randint(v, (n, apart), generator=generator)
        others[:, 0] = self.targets
        self.targets = others.to(device)[:, 0]
        self.upstream = torch.randn(2, n, generator=generator).to(device)
        self.trained = trained

    def run(self, function, kwargs, entropy, dtype=None):
        """Log-probabilities, entropies if asked for, and the gradients of the first few of the tensors."""
        given = [None if t is None else t.detach().to(dtype or t.dtype) for t in self.tensors]
        leaves = [t.requires_grad_() for t in given[: self.trained] if t is not None]
        lora = None if given[3] is None else (*given[3:], 0.75)
        outputs = function(given[0], given[1], self.targets, bias=given[2], lora=lora, **kwargs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs[: 1 + entropy])
        upstream = [g.to(o.dtype) for g, o in zip(self.upstream, outputs, strict=False)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    def judge(self, exact_enough, in_other_orders, kwargs, entropy, **ours):
        actual = self.run(linear_logprob, {**kwargs, **ours, "entropy": entropy}, entropy)
        eager = zip(*(self.run(f, kwargs, entropy) for f in in_other_orders(plain, self.tensors[0].dtype)), strict=True)
        exact = self.run(plain, kwargs, entropy, torch.float64)
        names = ["logprobs", *["entropy"] * entropy, "hidden", "weight", "bias", "A", "B"]
        for name, *three in zip(names, actual, eager, exact, strict=False):
            exact_enough(name, *three)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.7, 2.0]),
        "softcap": st.sampled_from([5.0, 30.0]),
        "logit_scale": st.sampled_from([0.1, 2.0]),
    },
)


@settings(max_examples=6)
@given(
    h=st.integers(48, 96), v=st.integers(100, 500), dtype=st.sampled_from(DTYPES), options=OPTIONS,
    entropy=st.booleans(), rank=st.sampled_from([0, 0, 5]), bias=st.booleans(), trained=st.sampled_from([1, 2, 5]),
    max_memory=st.sampled_from([2**30, 2**18]), spread=st.sampled_from([0.3, 3.0]), apart=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@example(
    h=64, v=300, dtype=torch.bfloat16, options={"temperature": 0.7, "softcap": 5.0}, entropy=True, rank=3, bias=True,
    trained=5, max_memory=2**17, spread=3.0, apart=3, seed=1,
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
    entropy,
    rank,
    bias,
    trained,
    max_memory,
    spread,
    apart,
    seed,
):
    problem = Problem(
        32, h, v, dtype, device, seed=seed, spread=spread, rank=rank, bias=bias, trained=trained, apart=apart
    )  # fmt: skip
    recomputed = entropy or trained > 1
    with launched(FORWARD, SCALED, *[BACKWARD] * recomputed):
        problem.judge(exact_enough, in_other_orders, options, entropy, max_memory=max_memory)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_plain_way_is_exact_too(exact_enough, in_other_orders, monkeypatch, dtype):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    problem = Problem(64, 40, 300, dtype, "cpu", rank=3, bias=True, trained=5)
    if dtype == torch.float64:
        kwargs = {"softcap": 9.0, "temperature": 0.7}
        expected = problem.run(plain, kwargs, True)
        torch.testing.assert_close(problem.run(linear_logprob, {**kwargs, "entropy": True}, True), expected)
    else:
        problem.judge(exact_enough, in_other_orders, {"softcap": 9.0, "temperature": 0.7}, True)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_and_even_rows(device, monkeypatch, kernels, dtype):
    """Entropy is neither lost where one class has nearly everything nor where all are alike."""
    if not kernels:
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    logits = torch.zeros(5, 64, device=device)
    logits[1:, 7] = torch.tensor([3.0, 10.0, 30.0, 300.0], device=device)
    hidden, weight = torch.eye(5, device=device, dtype=dtype), logits.t().to(dtype).contiguous()
    for target in (7, 8):
        given = linear_logprob(hidden, weight, torch.full((5,), target, device=device), entropy=True)
        log_p = logits.double().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(given.entropy.double(), entropy, rtol=1e-4 if kernels else 1e-3, atol=1e-6)
        torch.testing.assert_close(given.logprobs.double(), log_p[:, target], rtol=1e-5, atol=1e-6)


def test_top1(device):
    problem = Problem(30, 16, 50, torch.float32, device)
    hidden, weight = problem.tensors[:2]
    weight[9] = weight[3]  # equally likely: the first
    best = torch.where(problem.targets == -100, -1, (hidden @ weight.t()).argmax(-1))
    given = linear_logprob(hidden, weight, problem.targets, top1=True, max_memory=2**16)
    assert isinstance(given, TokenLogProbs)
    assert given.entropy is None
    assert torch.equal(given.top1, best)
    assert not (given.top1 == 9).any()
    assert isinstance(linear_logprob(hidden, weight, problem.targets), torch.Tensor)


@pytest.mark.parametrize(("rank", "dtype"), [(0, torch.float16), (0, torch.float32), (4, torch.bfloat16)])
def test_a_detached_entropy_is_the_entropy_and_changes_nothing(device, dtype, rank):
    """The gradient of hidden states alone is made forward all the same; that of an adapter is made in backward."""
    problem = Problem(40, 32, 130, dtype, device, rank=rank)
    hidden, weight, _, a, b = problem.tensors
    lora = None if a is None else (a, b, 0.75)
    leaves = [t.requires_grad_() for t in (hidden, a, b) if t is not None]

    def run(entropy):
        made = linear_logprob(hidden, weight, problem.targets, lora=lora, temperature=0.7, entropy=entropy)
        logprobs = made if isinstance(made, torch.Tensor) else made.logprobs
        return made, torch.autograd.grad(logprobs, leaves, problem.upstream[0].to(logprobs.dtype))

    (both, gradients), (alone, expected), (asked, _) = run("detached"), run(False), run(True)
    assert not both.entropy.requires_grad
    assert both.logprobs.requires_grad
    assert asked.entropy.requires_grad
    assert torch.equal(both.entropy, asked.entropy.detach())
    assert torch.equal(both.logprobs, alone)
    assert all(map(torch.equal, gradients, expected))


def test_ignored_rows_are_zero(device):
    problem = Problem(20, 16, 50, torch.float32, device)
    logprobs, entropy, gradient = problem.run(linear_logprob, {"entropy": True}, True)
    ignored = problem.targets == -100
    for tensor in (logprobs, entropy, gradient):
        assert not tensor[ignored].any()
        assert tensor[~ignored].any(-1).all() if tensor.dim() > 1 else tensor[~ignored].all()


def test_shapes_and_no_gradient(device, launched):
    problem = Problem(30, 16, 50, torch.float16, device)
    hidden, weight = problem.tensors[:2]
    with launched(FORWARD):
        given = linear_logprob(hidden.view(5, 6, 16), weight, problem.targets.view(5, 6), entropy=True, top1=True)
    assert all(t.shape == (5, 6) for t in given)
    assert [t.dtype for t in given] == [torch.float32, torch.float32, torch.int64]
    with launched():
        empty = linear_logprob(hidden[:0], weight, problem.targets[:0], entropy=True, top1=True)
    assert all(t.shape == (0,) for t in empty)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.5, "temperature": 0.6}])
def test_gradcheck(options):
    problem = Problem(6, 4, 7, torch.float64, "cpu", rank=2, bias=True)
    leaves = [t.requires_grad_() for t in problem.tensors]

    def function(hidden, weight, bias, a, b):
        given = linear_logprob(
            hidden, weight, problem.targets, bias=bias, lora=(a, b, 0.5), entropy=True, max_memory=2500, **options
        )  # fmt: skip
        return given.logprobs, given.entropy

    assert torch.autograd.gradcheck(function, leaves)
    frozen = [t.detach() for t in leaves[1:]]
    assert torch.autograd.gradcheck(
        lambda hidden: linear_logprob(hidden, frozen[0], problem.targets, **options), leaves[0]
    )


def test_opcheck(device):
    from ft_kernels.ops.linear_head.autograd import linear_head_op

    problem = Problem(7, 16, 40, torch.float32, device, rank=2, bias=True)
    tensors = [t.requires_grad_() for t in problem.tensors]
    torch.library.opcheck(
        linear_head_op,
        (*tensors, problem.targets, 0.5, -100, 0.0, 30.0, 1.0, 0.0, 0.7, 2**16, True, True, False),
    )


def test_compile(device):
    problem = Problem(18, 16, 50, torch.float32, device)
    hidden, weight = (t.requires_grad_() for t in problem.tensors[:2])

    def policy_loss(hidden, weight):
        given = linear_logprob(hidden, weight, problem.targets, entropy=True, temperature=0.9)
        return (given.logprobs.exp() - 0.01 * given.entropy).sum()

    compiled = torch.compile(policy_loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    gradients = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(policy_loss(hidden, weight), (hidden, weight)))


@pytest.mark.gpu
@pytest.mark.parametrize("entropy", [True, False])
def test_cuda_graph(device, entropy):
    problem = Problem(300, 128, 1000, torch.bfloat16, device)
    hidden = problem.tensors[0].requires_grad_()

    def step():
        given = linear_logprob(
            hidden, problem.tensors[1], problem.targets, entropy=entropy, top1=True, max_memory=2**20
        )  # fmt: skip
        loss = given.logprobs.sum() + (given.entropy.sum() if entropy else 0)
        return *given, torch.autograd.grad(loss, hidden)[0]

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
        if made is not None:
            torch.testing.assert_close(made, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "linear_logprob: temperature=0.0; allowed is a positive number"),
        ({"logit_scale": -1.0}, "linear_logprob: logit_scale=-1.0; allowed is a positive number"),
        ({"entropy": "no"}, "linear_logprob: entropy='no'; allowed are True, False and 'detached'"),
        ({"targets": torch.tensor([1])}, r"linear_logprob: hidden \[2, 3\] and targets \[1\] do not fit"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**given, **arguments})
