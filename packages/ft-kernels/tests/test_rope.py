from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_kernels import dispatch, nn, rope
from ft_kernels.ops.rope import reference

FORWARD, BACKWARD = "rope", "rope_backward"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def table(positions, pairs, base=100.0):
    """Angles of positions ``[...]`` as ``[..., pairs]``, in float64."""
    return torch.as_tensor(positions)[..., None].double() * base ** (-torch.arange(pairs).double() / pairs)


def eager(q, k, cos, sin, interleaved):
    """transformers' way: q·cos + rotate_half(q)·sin in q's dtype, with angles ``[B, S, pairs]`` and heads before D."""

    def turn(x):
        rotary = 2 * cos.shape[-1]
        turning, rest = x[..., :rotary], x[..., rotary:]
        if interleaved:
            doubled = [t.repeat_interleave(2, -1).unsqueeze(2) for t in (cos, sin)]
            other = torch.stack((-turning[..., 1::2], turning[..., ::2]), -1).flatten(-2)
        else:
            doubled = [torch.cat((t, t), -1).unsqueeze(2) for t in (cos, sin)]
            first, second = turning.chunk(2, -1)
            other = torch.cat((-second, first), -1)
        return torch.cat((turning * doubled[0] + other * doubled[1], rest), -1)

    return turn(q), turn(k)


def both(function, q, k, dq, dk):
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    outs = function(*leaves)
    grads = torch.autograd.grad(outs, leaves, [d.to(o.dtype) for d, o in zip((dq, dk), outs, strict=True)])
    return [*outs, *grads]


def judge(exact_enough, actual, wanted, exact):
    for name, *three in zip(("q", "k", "dq", "dk"), actual, wanted, exact, strict=True):
        exact_enough(name, *three)


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 9), heads=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    pairs=st.integers(1, 40), rest=st.sampled_from([0, 0, 1, 16, 33]), interleaved=st.booleans(),
    memory=st.sampled_from(["BSHD", "BHSD", "packed projection", "last dimension apart"]),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(["pairs", "doubled", "repeated", "one sequence", "longer table", "table"]),
    scale=st.sampled_from([1e-3, 1.0, 3e3]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_exact(
    device, exact_enough, launched, batch, length, heads, pairs, rest, interleaved, memory, dtype, form, scale, seed
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    d = 2 * pairs + rest
    if memory == "packed projection":
        both_heads = (normal(generator, batch, length, sum(heads), d + 3) * scale).to(dtype).to(device)[..., 2:-1]
        q, k = both_heads.split(heads, 2)
    elif memory == "BHSD":
        q, k = ((normal(generator, batch, h, length, d) * scale).to(dtype).to(device).transpose(1, 2) for h in heads)
    elif memory == "BSHD":
        q, k = ((normal(generator, batch, length, h, d) * scale).to(dtype).to(device) for h in heads)
    else:
        q, k = ((normal(generator, d, batch, length, h) * scale).to(dtype).to(device).movedim(0, -1) for h in heads)
    dq, dk = (normal(generator, *t.shape).to(dtype).to(device) for t in (q, k))
    positions = torch.randint(0, 50, (1 if form == "one sequence" else batch, length), generator=generator)
    if form == "longer table":
        positions = torch.arange(length).expand(batch, length)
    angles = table(positions, pairs)
    cos, sin = (t.to(dtype).to(device) for t in (angles.cos(), angles.sin()))  # what a token gets
    given_cos, given_sin, position_ids = cos, sin, None
    if form == "doubled":
        given_cos, given_sin = (torch.cat((t, t), -1) for t in (cos, sin))
    elif form == "repeated":
        given_cos, given_sin = (t.repeat_interleave(2, -1)[..., ::2] for t in (cos, sin))
    elif form in ("table", "longer table"):
        whole = table(torch.arange(50), pairs)
        given_cos, given_sin = (t.to(dtype).to(device) for t in (whole.cos(), whole.sin()))
        position_ids = positions.to(device) if form == "table" else None

    def ours(q, k):
        return rope(
            q, k, given_cos, given_sin, position_ids=position_ids, rotary_dim=2 * pairs,
            layout="interleaved" if interleaved else "half",
        )  # fmt: skip

    with launched(FORWARD, BACKWARD):
        actual = both(ours, q, k, dq, dk)
    wanted = both(lambda q, k: eager(q, k, cos, sin, interleaved), q, k, dq, dk)
    exact = both(
        lambda q, k: eager(q, k, cos.double(), sin.double(), interleaved), *(t.double() for t in (q, k, dq, dk))
    )
    assert all(t.dtype == dtype for t in actual)
    judge(exact_enough, actual, wanted, exact)
    if rest:
        assert torch.equal(actual[0][..., 2 * pairs :], q[..., 2 * pairs :])
    saved = q.clone(), k.clone()
    before = both_heads.clone() if memory == "packed projection" else None
    with torch.no_grad(), launched(FORWARD):
        same = rope(
            q, k, given_cos, given_sin, position_ids=position_ids, rotary_dim=2 * pairs, inplace=True,
            layout="interleaved" if interleaved else "half",
        )  # fmt: skip
    assert same[0] is q
    assert same[1] is k
    assert torch.equal(q, actual[0])
    assert torch.equal(k, actual[1])
    if before is not None:
        assert torch.equal(both_heads, torch.cat((q, k), 2))
        assert not torch.equal(both_heads, before) or positions.max() == 0
    with torch.no_grad():
        assert torch.equal(ours(*saved)[0], q)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_heads_are_worked_on_in_parts(device, exact_enough, launched, monkeypatch, dtype, interleaved):
    from ft_kernels.ops.rope import kernels

    monkeypatch.setattr(kernels, "TILE", 64)
    generator = torch.Generator().manual_seed(2)
    q, k, dq, dk = (normal(generator, 2, 5, h, 24).to(dtype).to(device) for h in (21, 5, 21, 5))
    angles = table(torch.arange(5), 8)[None]
    cos, sin = (t.to(dtype).to(device) for t in (angles.cos(), angles.sin()))
    layout = "interleaved" if interleaved else "half"
    with launched(FORWARD, BACKWARD):
        actual = both(lambda q, k: rope(q, k, cos, sin, rotary_dim=16, layout=layout), q, k, dq, dk)
    wanted = both(lambda q, k: eager(q, k, cos, sin, interleaved), q, k, dq, dk)
    exact = both(
        lambda q, k: eager(q, k, cos.double(), sin.double(), interleaved), *(t.double() for t in (q, k, dq, dk))
    )
    judge(exact_enough, actual, wanted, exact)


@pytest.mark.parametrize(
    ("sections", "interleaved"),
    [((2, 3, 3), False), ((4, 2, 2), True), ((3, 3, 2), True), ((5, 3), False), ((1, 2, 3, 2), False)],
)
@pytest.mark.parametrize("form", ["table", "streams"])
def test_sections(device, launched, sections, interleaved, form):
    generator = torch.Generator().manual_seed(3)
    pairs, streams = sum(sections), len(sections)
    q, k = (normal(generator, 2, 6, h, 20).float().to(device) for h in (3, 2))
    positions = torch.randint(0, 30, (streams, 2, 6), generator=generator)
    owner = [i for i, n in enumerate(sections) for _ in range(n)]
    if interleaved:
        owner = [i % 3 if i < 3 * sections[i % 3] and i % 3 else 0 for i in range(pairs)]
    all_angles = table(positions, pairs)
    angles = torch.stack([all_angles[stream, ..., i] for i, stream in enumerate(owner)], -1)
    cos, sin = (t.float().to(device) for t in (angles.cos(), angles.sin()))
    settings = {"rotary_dim": 2 * pairs, "sections": sections, "interleaved_sections": interleaved}
    if form == "table":
        whole = table(torch.arange(30), pairs)
        tables, settings["position_ids"] = (whole.cos(), whole.sin()), positions.int().to(device)
    else:
        tables = (torch.cat((t, t), -1) for t in (all_angles.cos(), all_angles.sin()))
    tables = [t.float().to(device) for t in tables]
    with launched(FORWARD, BACKWARD):
        actual = both(lambda q, k: rope(q, k, *tables, **settings), q, k, q, k)
    wanted = both(lambda q, k: eager(q, k, cos, sin, False), q, k, q, k)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other)
    with launched():
        again = rope(q.double(), k.double(), *tables, **settings)
    torch.testing.assert_close(again[0].float(), wanted[0])


def test_packed_documents(device, launched):
    q, k = torch.randn(11, 4, 8, device=device), torch.randn(11, 2, 8, device=device)
    lengths = [4, 1, 6]
    position_ids = torch.cat([torch.arange(n) for n in lengths]).to(device)
    whole = table(torch.arange(16), 4).float().to(device)
    with launched(FORWARD):
        packed = rope(q, k, whole.cos(), whole.sin(), position_ids=position_ids, rotary_dim=8)
        start = 0
        for n in lengths:
            alone = rope(q[start : start + n], k[start : start + n], whole.cos(), whole.sin(), rotary_dim=8)
            assert torch.equal(packed[0][start : start + n], alone[0])
            assert torch.equal(packed[1][start : start + n], alone[1])
            start += n


@pytest.mark.parametrize("heads_dim", [0, -3])
def test_heads_before_the_tokens(device, launched, heads_dim):
    q, k = torch.randn(4, 7, 8, device=device), torch.randn(2, 7, 8, device=device)
    angles = table(torch.arange(7), 4).float().to(device)
    with launched(FORWARD):
        turned = rope(q, k, angles.cos(), angles.sin(), rotary_dim=8, heads_dim=heads_dim)
        wanted = rope(q.transpose(0, 1), k.transpose(0, 1), angles.cos(), angles.sin(), rotary_dim=8)
    assert torch.equal(turned[0], wanted[0].transpose(0, 1))
    assert torch.equal(turned[1], wanted[1].transpose(0, 1))


def test_position_outside_the_table(device, launched):
    q, k = torch.randn(3, 2, 8, device=device), torch.randn(3, 1, 8, device=device)
    whole = table(torch.arange(5), 4).float().to(device)
    arguments = {"position_ids": torch.tensor([4, 5, -1], device=device), "rotary_dim": 8}
    with launched(FORWARD):
        new_q, new_k = rope(q, k, whole.cos(), whole.sin(), **arguments)
    assert torch.isfinite(new_q[0]).all()
    assert torch.isfinite(new_k[0]).all()
    assert new_q[1:].isnan().all()
    assert new_k[1:].isnan().all()
    with pytest.raises(IndexError):
        rope(
            *(t.double().cpu() for t in (q, k, whole.cos(), whole.sin())),
            position_ids=torch.tensor([0, 1, 5]),
            rotary_dim=8,
        )


def test_inplace_where_gradients_are_recorded(device, launched):
    leaf = torch.randn(2, 3, 6, 8, device=device, requires_grad=True)
    angles = table(torch.arange(3), 4).float().to(device)
    projected = leaf * 1.5
    q, k = projected.split((4, 2), 2)  # views of one tensor, as a packed projection gives them
    before = projected.detach().clone()
    with launched(FORWARD, BACKWARD):
        new_q, new_k = rope(q, k, angles.cos(), angles.sin(), rotary_dim=8, inplace=True)
        (grad,) = torch.autograd.grad(new_q.square().sum() + new_k.pow(3).sum(), leaf, retain_graph=True)
    assert torch.equal(projected, before)
    wanted_q, wanted_k = eager(q, k, angles.cos()[None], angles.sin()[None], False)
    (wanted,) = torch.autograd.grad(wanted_q.square().sum() + wanted_k.pow(3).sum(), leaf)
    torch.testing.assert_close(grad, wanted)


def test_inplace_is_seen_by_autograd(device, launched):
    weight = torch.randn(8, 8, device=device, requires_grad=True)
    q, k = torch.randn(2, 3, 1, 8, device=device).unbind(0)
    angles = table(torch.arange(1), 4).float().to(device)
    saved_q = q @ weight  # needs q as it was
    with torch.no_grad(), launched(FORWARD):
        rope(q[:, :, None], k[:, :, None], angles.cos(), angles.sin(), rotary_dim=8, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_q.sum().backward()


def test_inplace_of_memory_that_is_shared(device, launched):
    q = torch.randn(2, 1, 1, 8, device=device).expand(2, 3, 4, 8)
    k = torch.randn(2, 3, 1, 8, device=device)
    before = k.clone()
    angles = table(torch.arange(3), 4).float().to(device)
    with launched(FORWARD):
        new_q, new_k = rope(q, k, angles.cos(), angles.sin(), rotary_dim=8, inplace=True)
    wanted = eager(q, before, angles.cos()[None], angles.sin()[None], False)
    torch.testing.assert_close(new_q, wanted[0])
    torch.testing.assert_close(new_k, wanted[1])
    assert torch.equal(k, before)


def test_inplace_of_the_reference(monkeypatch, launched):
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    q, k = torch.randn(2, 3, 2, 8).unbind(0)
    angles = table(torch.arange(3), 4).float()
    with launched():
        wanted = rope(q, k, angles.cos(), angles.sin(), rotary_dim=8)
        turned = rope(q, k, angles.cos(), angles.sin(), rotary_dim=8, inplace=True)
    assert turned[0] is q
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])


def test_gradients_turned_in_place(device, launched):
    from ft_kernels.ops.rope import kernels

    q, k = torch.randn(2, 3, 4, 10, device=device), torch.randn(2, 3, 1, 10, device=device)
    angles = table(torch.arange(3), 4).float().to(device).expand(1, 2, 3, 4)
    before = q.clone(), k.clone()
    with launched(FORWARD, BACKWARD):
        turned = kernels.rotate(q, k, angles.cos(), angles.sin())
        back = kernels.rotate(*turned, angles.cos(), angles.sin(), back=True, inplace=True)
    assert back[0] is turned[0]
    torch.testing.assert_close(back[0], before[0])
    torch.testing.assert_close(back[1], before[1])
    assert torch.equal(q, before[0])


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
@pytest.mark.parametrize("inplace", [False, True])
def test_empty(device, launched, shape, inplace):
    q = torch.randn(shape, device=device, requires_grad=not inplace)
    angles = table(torch.arange(shape[1]), 4).float().to(device)
    with launched():
        new_q, new_k = rope(q, q.detach(), angles.cos(), angles.sin(), rotary_dim=8, inplace=inplace)
        if not inplace:
            new_q.sum().backward()
    assert new_q.shape == new_k.shape == shape


def test_keys_alone_have_no_heads(device, launched):
    q, k = torch.randn(1, 3, 2, 8, device=device), torch.randn(1, 3, 0, 8, device=device)
    angles = table(torch.arange(3), 4).float().to(device)
    with launched(FORWARD):
        new_q, new_k = rope(q, k, angles.cos(), angles.sin(), rotary_dim=8)
    torch.testing.assert_close(new_q, eager(q, q, angles.cos()[None], angles.sin()[None], False)[0])
    assert new_k.shape == k.shape


def test_no_gradient_for_the_angles(device, launched):
    q, k = torch.randn(2, 1, 3, 1, 8, device=device).unbind(0)
    angles = table(torch.arange(3), 4).float().to(device).requires_grad_()
    with launched(FORWARD):
        assert not rope(q, k, angles.cos(), angles.sin(), rotary_dim=8)[0].requires_grad
    with launched():
        assert not rope(q.double(), k.double(), angles.cos(), angles.sin(), rotary_dim=8)[0].requires_grad


def test_extreme_values(device, launched):
    q = torch.tensor([[[3e38, 1.0, -3e38, 1e-30]]], device=device)
    cos, sin = torch.tensor([[0.6, 1.0]], device=device), torch.tensor([[0.8, 0.0]], device=device)
    with launched(FORWARD):
        turned, _ = rope(q, q, cos, sin, rotary_dim=4)
    assert turned[0, 0, 0] == torch.inf
    torch.testing.assert_close(turned[0, 0, 1:].cpu(), torch.tensor([1.0, 6e37, 1e-30]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck_of_the_reference(layout, inplace):
    leaves = [torch.randn(2, 3, h, 7, dtype=torch.float64, requires_grad=True) for h in (2, 1)]
    angles = table(torch.arange(3), 3)

    def function(q, k):
        return rope(q, k, 1.3 * angles.cos(), 1.3 * angles.sin(), rotary_dim=6, layout=layout, inplace=inplace)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_opcheck(device, launched):
    from ft_kernels.ops.rope.autograd import rope_inplace_op, rope_op

    leaves = [torch.randn(2, 3, h, 10, device=device, requires_grad=True) for h in (2, 1)]
    angles = table(torch.randint(0, 9, (3, 2, 3)), 4).float().to(device)
    whole = table(torch.arange(9), 4).float().to(device)
    positions = torch.randint(0, 9, (1, 2, 3), device=device)
    with launched(FORWARD, BACKWARD):
        torch.library.opcheck(rope_op, (*leaves, angles.cos(), angles.sin(), None, [1, 2, 1], True, False, False))
        torch.library.opcheck(rope_op, (*leaves, whole.cos(), whole.sin(), positions, [], False, False, True))
    plain = [t.detach() for t in leaves]
    with launched(FORWARD):
        torch.library.opcheck(
            rope_inplace_op, (*plain, angles.cos(), angles.sin(), None, [2, 1, 1], False, True, False)
        )


@pytest.mark.parametrize("recorded", [True, False])
def test_compile(device, launched, recorded):
    layer = nn.RotaryEmbedding(8, layout="interleaved", device=device)
    q, k = (torch.randn(2, 5, h, 8, device=device, requires_grad=recorded) for h in (4, 2))
    position_ids = torch.tensor([0, 1, 2, 0, 1], device=device)

    def function(q, k):
        return layer(q * 2, k * 2, position_ids, inplace=True)

    wanted = function(q, k)
    with launched(FORWARD, BACKWARD) if recorded else launched(FORWARD):
        compiled = torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        turned = compiled(q, k)
        if recorded:
            grads = torch.autograd.grad(turned, (q, k), [t.detach() for t in turned])
    torch.testing.assert_close(turned, wanted)
    if recorded:
        torch.testing.assert_close(grads, torch.autograd.grad(wanted, (q, k), [t.detach() for t in wanted]))


def test_layer():
    layer = nn.RotaryEmbedding(6, 100.0, scale=2.0, heads_dim=1)
    q, k = torch.randn(2, 4, 5, 9), torch.randn(2, 1, 5, 9)
    angles = table(torch.arange(5), 3)[None]
    wanted = eager(q.transpose(1, 2), k.transpose(1, 2), 2 * angles.cos().float(), 2 * angles.sin().float(), False)
    turned = layer(q, k)
    torch.testing.assert_close(turned, tuple(t.transpose(1, 2) for t in wanted))
    torch.testing.assert_close(layer(q, k, torch.arange(5)), turned)
    multimodal = nn.RotaryEmbedding(6, 100.0, scale=2.0, heads_dim=1, sections=(1, 1, 1))
    torch.testing.assert_close(multimodal(q, k), turned)
    assert list(layer.state_dict()) == []
    assert repr(layer).startswith("RotaryEmbedding(6, base=100.0, scale=2.0, layout='half', heads_dim=1")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device, launched):
    tokens = 2**31 // (32 * 128) + 3
    q = torch.empty(1, 32, tokens, 128, device=device, dtype=torch.bfloat16).normal_()  # heads lie far apart
    k = torch.empty(1, tokens, 1, 128, device=device, dtype=torch.bfloat16).normal_().transpose(1, 2)
    last_q, last_k = q[:, :, -3:].clone(), k[:, :, -3:].clone()
    angles = table(torch.arange(2048), 64).float().to(device)
    position_ids = torch.arange(tokens, device=device) % 2048
    with torch.no_grad(), launched(FORWARD):
        new_q, new_k = rope(
            q, k, angles.cos(), angles.sin(), position_ids=position_ids, rotary_dim=128, heads_dim=1, inplace=True
        )
    cos, sin = (t[position_ids[-3:]][None] for t in (angles.cos(), angles.sin()))
    wanted = reference.rope(
        last_q.transpose(1, 2).double(), last_k.transpose(1, 2).double(), cos[None], sin[None], None, [], False, False
    )
    torch.testing.assert_close(new_q[:, :, -3:].transpose(1, 2).double(), wanted[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(new_k[:, :, -3:].transpose(1, 2).double(), wanted[1], rtol=2**-8, atol=1e-5)


@pytest.mark.gpu
def test_device_that_is_not_current_and_graph(device, launched):
    target = torch.device("cuda", torch.cuda.device_count() - 1)
    q, k = (torch.randn(2, 64, h, 128, device=target, dtype=torch.bfloat16, requires_grad=True) for h in (32, 8))
    angles = table(torch.arange(64), 64).float().to(target)

    def step():
        turned = rope(q, k, angles.cos(), angles.sin(), rotary_dim=128)
        return [*turned, *torch.autograd.grad(turned, [q, k], [t.detach() for t in turned])]

    expected = [t.detach() for t in step()]  # without a graph, whose nodes belong to the stream that made it
    with torch.cuda.device(target):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with launched(FORWARD, BACKWARD), torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        torch.cuda.synchronize()
    for one, other in zip(captured, expected, strict=True):
        assert torch.equal(one, other)


Q, K, ANGLES = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 1, 8), torch.ones(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": Q.long()}, TypeError, "q has dtype torch.int64; use a floating-point dtype"),
        ({"k": K.to("meta")}, ValueError, "k is on meta, q on cpu"),
        ({"k": K[0]}, ValueError, r"q is \[2, 3, 4, 8\], k \[3, 1, 8\]; both are \[B, S, heads, D\]"),
        ({"k": K[:, :2]}, ValueError, "only the number of heads may differ"),
        ({"sin": ANGLES[:2]}, ValueError, r"cos is \[3, 8\], sin \[2, 8\]; use one shape"),
        ({"cos": ANGLES[:, :4], "sin": ANGLES[:, :4]}, ValueError, r"rotary_dim=8 \(a column for each pair\) or 4"),
        ({"rotary_dim": 10}, ValueError, "rotary_dim is 10; allowed are even numbers from 2 to 8"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim is 3; allowed are even numbers"),
        ({"rotary_dim": 6}, ValueError, "cos has 8 columns; rotary_dim=6 needs 3, or 6 doubled"),
        ({"layout": "neox"}, ValueError, "layout='neox'; allowed are 'half' and 'interleaved'"),
        ({"heads_dim": 3}, ValueError, "heads_dim=3; allowed are -2"),
        ({"sections": [1, 2]}, ValueError, r"sections are \[1, 2\]; allowed are two to four numbers that add up to 4"),
        ({"interleaved_sections": True}, ValueError, "interleaved_sections is set without sections"),
        ({"sections": [2, 2], "interleaved_sections": True}, ValueError, "allowed are three numbers"),
        ({"sections": [2, 2]}, ValueError, r"cos and sin have shape \[3, 8\]; 2 sequences of 3 tokens need \[2 st"),
        ({"cos": ANGLES[:2], "sin": ANGLES[:2]}, ValueError, r"need \[3, n\] or \[2 or 1, 3, n\]"),
        ({"position_ids": torch.ones(3)}, TypeError, "position_ids have dtype torch.float32"),
        ({"position_ids": torch.ones(4).long()}, ValueError, r"position_ids have shape \[4\]; .* need \[3\] or \[2"),
        ({"position_ids": torch.ones(3, device="meta").long()}, ValueError, "position_ids are on meta"),
        ({"cos": ANGLES[None], "sin": ANGLES[None], "position_ids": torch.ones(3).long()}, ValueError, "it is a table"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        rope(**{"q": Q, "k": K, "cos": ANGLES, "sin": ANGLES, **arguments})
