"""Attention in which runs of tokens see each other both ways, as an image's tokens do in Gemma 3."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_kernels import packed_attention, plan_attention
from ft_kernels.ops.packed_attention.choose import Case, choose, why_not


def mask(lengths, together, window):
    """``[T, T]``, token by token as the words say it: what is before in its document, within the window, and what
    follows in its own run."""
    document = [i for i, n in enumerate(lengths) for _ in range(n)]
    run = []
    for number, (_, group) in enumerate(groupby(zip(document, together, strict=True)), 1):
        members = list(group)
        run += [number if members[0][1] else 0] * len(members)
    seen = torch.zeros(len(document), len(document), dtype=torch.bool)
    for i in range(len(document)):
        for j in range(len(document)):
            near = window is None or i - j < window
            seen[i, j] = document[i] == document[j] and near and (j <= i or (run[i] != 0 and run[i] == run[j]))
    return seen


def eager(q, k, v, seen, softcap):
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen.to(q.device), torch.finfo(q.dtype).min)
    wide = torch.promote_types(q.dtype, torch.float32)
    return (weights.softmax(-1, dtype=wide).to(q.dtype) @ values).transpose(0, 1)


def draw(total, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(total, heads, 16, generator=generator, dtype=torch.float64).to(device, dtype)
        for heads in (4, 2, 2, 4)
    ]


def both(function, q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


runs = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=2, max_size=6)


def laid_out(pieces, cut):
    together = [flag for n, flag in pieces for _ in range(n)]
    cut %= len(together) + 1
    return torch.tensor(together), [cut, len(together) - cut]


@settings(max_examples=60)
@given(pieces=runs, cut=st.integers(0, 60), window=st.sampled_from([None, 1, 3, 7]))
def test_intervals(pieces, cut, window):
    """They are the mask's, and never decrease: what a tile of the kernel takes its bounds from."""
    together, lengths = laid_out(pieces, cut)
    seen, total = mask(lengths, together.tolist(), window), len(together)
    plans = [plan_attention(lengths=lengths, together=together)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    plans.append(plan_attention(position_ids=positions, together=together))
    for plan in plans:
        intervals = plan.intervals(True, window, total, torch.device("cpu"))
        number = torch.arange(total)
        for line, rows in ((intervals[:2], seen), (intervals[2:], seen.T)):
            assert torch.equal(rows, (number >= line[0][:, None]) & (number <= line[1][:, None]))
            assert (line.diff() >= 0).all()
        assert torch.equal(plan.pairs(window, torch.device("cpu")), seen)


@settings(max_examples=20)
@given(
    pieces=runs, cut=st.integers(0, 60), window=st.sampled_from([None, 2, 7]), softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_reference(device, pieces, cut, window, softcap, seed):
    together, lengths = laid_out(pieces, cut)
    tensors = draw(len(together), torch.float64, device, seed)
    plan, seen = plan_attention(lengths=lengths, together=together), mask(lengths, together.tolist(), window)
    found = both(lambda q, k, v: packed_attention(q, k, v, plan=plan, window=window, softcap=softcap), *tensors)
    expected = both(lambda q, k, v: eager(q, k, v, seen, softcap), *tensors)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("exact", [False, True])
def test_kernel_is_exact(device, exact_enough, launched, window, exact):
    """Over several tiles, with runs that begin and end anywhere in them, at a document's ends too."""
    pieces = [(5, True), (30, False), (40, True), (3, False), (17, True), (25, True), (20, False)]
    together, _ = laid_out(pieces, 0)
    lengths = [95, 45]
    plan, seen = plan_attention(lengths=lengths, together=together), mask(lengths, together.tolist(), window)
    tensors = draw(len(together), torch.float16, device, 0)
    names = ["packed_attention_forward", "packed_attention_backward_keys", "packed_attention_backward_queries"]
    with launched(*names, *([] if exact else ["packed_attention_delta"])):
        found = both(
            lambda q, k, v: packed_attention(q, k, v, plan=plan, window=window, backend="triton", exact=exact), *tensors
        )
    plain = both(lambda q, k, v: eager(q, k, v, seen, None), *tensors)
    best = both(lambda q, k, v: eager(q, k, v, seen, None), *(x.double() for x in tensors))
    for name, *three in zip(("out", "dq", "dk", "dv"), found, plain, best, strict=True):
        exact_enough(name, *three)


def test_flex_without_compilation():
    together, _ = laid_out([(5, True), (60, False), (70, True), (30, False)], 0)
    lengths = [100, 65]
    plan, seen = plan_attention(lengths=lengths, together=together), mask(lengths, together.tolist(), 30)
    q, k, v, _ = draw(165, torch.bfloat16, "cpu", 0)
    with torch.no_grad():
        found = packed_attention(q, k, v, plan=plan, window=30, backend="flex")
        best = eager(q.double(), k.double(), v.double(), seen, None)
    torch.testing.assert_close(found.double(), best, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "changes", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16, {"equal": True}, "triton"),
        ("cuda", (9, 0), torch.bfloat16, {"max_length": 8192}, "flex"),
        ("cuda", (8, 0), torch.bfloat16, {}, "triton"),
        ("cuda", (8, 0), torch.float32, {}, "reference"),
        ("cuda", (7, 5), torch.float16, {}, "reference"),
        ("cpu", (0, 0), torch.float32, {"equal": True}, "reference"),
    ],
)
def test_choice(device, capability, dtype, changes, expected):
    case = Case(**{
        "device": device, "capability": capability, "dtype": dtype, "head_dim": 128, "max_length": 2048,
        "equal": False, "together": True, **changes,
    })  # fmt: skip
    assert choose(case) == expected
    for backend in ("dense", "sdpa", "flash", "flash_attn", "chunked"):
        assert why_not(backend, case) == "it knows no tokens that see what follows them"


def test_bad_arguments():
    some = torch.tensor([True, False, True])
    with pytest.raises(TypeError, match=r"together has dtype torch\.int64; use bool"):
        plan_attention(lengths=[3], together=some.long())
    with pytest.raises(ValueError, match="together has 3 tokens, the documents have 4 in all"):
        plan_attention(lengths=[4], together=some)
    with pytest.raises(ValueError, match="got together and branches"):
        plan_attention(branches=[[1, 1, 1]], together=some)
    q = torch.ones(3, 1, 4)
    plan = plan_attention(lengths=[3], together=some)
    with pytest.raises(ValueError, match="causal=False with together"):
        packed_attention(q, q, q, plan=plan, causal=False)
    with pytest.raises(ValueError, match="backend='sdpa' cannot compute this: it knows no tokens that see"):
        packed_attention(q, q, q, plan=plan, backend="sdpa")
