"""Documents that share how they begin, against a whole mask and against the same documents one after the other."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from ft_kernels import attention_block, packed_attention, plan_attention
from ft_kernels.functional import Norm
from ft_kernels.ops.packed_attention import shared
from ft_kernels.ops.shared_rows.autograd import sum_rows

GROUPS = [[5, 3, 4], [0, 6], [4, 2, 0, 3], [7, 0]]
TOKENS = sum(map(sum, GROUPS))
SETTINGS = {
    "plain": {}, "window": {"window": 3}, "softcap": {"softcap": 2.0}, "scale": {"scale": 0.3},
    "sinks": {}, "all": {"window": 4, "softcap": 2.0},
}  # fmt: skip


def seen_and_distance() -> tuple[Tensor, Tensor]:
    """Which token sees which, and how far it is away, token by token from what a group is."""
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    place = torch.zeros(TOKENS, dtype=torch.int64)
    start = 0
    for prefix, *rest in GROUPS:
        shared = list(range(start, start + prefix))
        place[shared] = torch.arange(prefix)
        for i in shared:
            seen[i, shared[: i - start + 1]] = True
        start += prefix
        for own in rest:
            for i in range(own):
                seen[start + i, shared] = True
                seen[start + i, start : start + i + 1] = True
                place[start + i] = prefix + i
            start += own
    return seen, place[:, None] - place


def by_mask(q, k, v, sinks=None, *, window=None, softcap=None, scale=None):
    group = q.shape[1] // k.shape[1]
    seen, distance = seen_and_distance()
    if window is not None:
        seen = seen & (distance < window)
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, TOKENS, 1)], -1)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., :TOKENS], values)


@pytest.mark.parametrize("layout", ["rows", "batch", "heads first"])
@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_whole_mask(name, layout):
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, 4, 8), (TOKENS, 2, 8), (TOKENS, 2, 8), (4,)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    up = torch.randn(TOKENS, 4, 8, generator=generator, dtype=torch.float64)
    if name not in ("sinks", "all"):
        del leaves[3]
    plan = plan_attention(branches=GROUPS)
    assert plan.total == TOKENS
    given = leaves[:3]
    if layout != "rows":
        given = [x[None] for x in given]
    if layout == "heads first":
        given = [x.transpose(1, 2) for x in given]
    sinks = leaves[3] if len(leaves) == 4 else None
    out = packed_attention(*given, sinks=sinks, plan=plan, heads_first=layout == "heads first", **SETTINGS[name])
    assert out.shape == given[0].shape
    if layout == "heads first":
        out = out.transpose(1, 2)
    expected = by_mask(*leaves[:3], sinks, **SETTINGS[name])
    torch.testing.assert_close(out.view_as(up), expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(out, leaves, up.view_as(out))
    for one, other in zip(grads, torch.autograd.grad(expected, leaves, up), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_pairs(window):
    seen, distance = seen_and_distance()
    expected = seen if window is None else seen & (distance < window)
    assert torch.equal(plan_attention(branches=GROUPS).pairs(window, torch.device("cpu")), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 48, 5000])
def test_sums_of_rows(launched, device, dtype, width):
    x = torch.randn(7, 3, width, dtype=torch.float64).to(dtype).to(device)[:, 1]  # rows that lie apart
    index = torch.tensor([[0, 6, 3], [-1, -1, -1], [2, 2, -1], [5, -1, -1], [-1, 4, 1]], dtype=torch.int32).to(device)
    with launched(*(["shared_rows"] if dtype != torch.float64 else [])):
        out = sum_rows(x, index)
    wide = torch.cat([x.double(), x.new_zeros(1, width).double()])
    exact = wide[index.long()].sum(1)
    size = wide.abs()[index.long()].sum(1)
    # Two sums in float32 (float64), and a rounding to x's dtype, where the interpreter cuts bfloat16 off.
    sums = 2 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * size
    once = torch.finfo(dtype).eps * (1.0 if device == "cpu" else 0.5) * (exact.abs() + sums)
    assert out.dtype == dtype
    none = 2 * torch.finfo(dtype).tiny  # what the interpreter makes of a bfloat16 zero
    assert ((out.double() - exact).abs() <= sums + once + none).all()


def test_a_row_that_nobody_names_is_not_read(device):
    x = torch.full((2, 4), float("nan"), device=device)
    x[1] = 1.0
    index = torch.tensor([[1], [-1]], dtype=torch.int32, device=device)
    assert sum_rows(x, index).tolist() == [[1.0] * 4, [0.0] * 4]


def block_of(dtype, device, heads_normed):
    """An attention block's arguments, with adapters."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape, scale=0.3):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    hidden, heads, groups, d, r = 32, 4, 2, 16, 4
    sizes = [heads * d, groups * d, groups * d]
    given = {
        "norm": Norm(1 + draw(hidden), 1e-6), "qkv": draw(sum(sizes), hidden), "o": draw(hidden, heads * d),
        "a": [draw(r, hidden) for _ in range(3)] + [draw(r, heads * d)],
        "b": [draw(size, r) for size in sizes] + [draw(hidden, r)],
        "heads": heads, "kv_heads": groups, "head_dim": d, "rotary_dim": d,
        "q_norm": Norm(1 + draw(d), 1e-6) if heads_normed else None,
        "k_norm": Norm(1 + draw(d), 1e-6) if heads_normed else None,
    }  # fmt: skip
    for tensor in (*given["a"], *given["b"]):
        tensor.requires_grad_()
    return given, draw(1, TOKENS, hidden, scale=1.0), draw(1, TOKENS, hidden, scale=1.0)


def whole_rows() -> tuple[list[int], list[int]]:
    """The tokens of the documents with their prefixes copied, and the documents' lengths."""
    tokens, lengths, start = [], [], 0
    for prefix, *rest in GROUPS:
        shared = list(range(start, start + prefix))
        start += prefix
        for own in rest:
            tokens += [*shared, *range(start, start + own)]
            lengths.append(prefix + own)
            start += own
    return tokens, lengths


CASES = [
    pytest.param(torch.float32, False, None, "all", id="float32, all kept"),
    pytest.param(torch.float32, True, None, "most", id="float32, heads normed"),
    pytest.param(torch.float32, False, 8, "none", id="float32, tiles, nothing kept"),
    *(
        pytest.param(torch.bfloat16, normed, tile, keep, id=f"{normed}, {tile}, {keep}", marks=pytest.mark.gpu)
        for normed, tile in ((False, None), (True, None), (True, 8))
        for keep in ("all", "most", "inputs", "none")
    ),
]


@pytest.mark.parametrize(("dtype", "normed", "tile", "keep"), CASES)
def test_a_block_of_a_layer(device, monkeypatch, dtype, normed, tile, keep):
    """A layer's half over shared prefixes computes what it does of the documents one after the other."""
    monkeypatch.setattr(shared, "PIECE", 20)  # copies of two groups, of one, and of one
    given, x, up = block_of(dtype, device, normed)
    tokens, lengths = whole_rows()
    position = torch.cat([torch.arange(n) for n in lengths])
    first = [tokens.index(i) for i in range(TOKENS)]
    angles = position[:, None] / 100 ** (torch.arange(8) / 8)

    def compute(x, where, plan, up):
        leaf = x.detach().requires_grad_()
        cos, sin = (f(angles[where]).to(dtype).to(device)[None] for f in (torch.cos, torch.sin))
        attend = functools.partial(packed_attention, plan=plan)
        out = attention_block(leaf, **given, cos=cos, sin=sin, attention=attend, keep=keep, tile=tile)
        return out, *torch.autograd.grad(out, [leaf, *given["a"], *given["b"]], up)

    together = compute(x, first, plan_attention(branches=GROUPS), up)
    alone_up = torch.zeros(1, len(tokens), up.shape[-1], dtype=dtype, device=device)
    alone_up[:, first] = up
    alone = list(compute(x[:, tokens], list(range(len(tokens))), plan_attention(lengths=lengths), alone_up))
    alone[0] = alone[0][:, first]
    of = torch.tensor(tokens, device=device)
    alone[1] = torch.zeros(1, TOKENS, x.shape[-1], device=device).index_add(1, of, alone[1].float()).to(dtype)
    # The sums are the same, in another order: as a norm, some roundings of the dtype.
    bound = 16 * torch.finfo(dtype).eps
    for one, other in zip(together, alone, strict=True):
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash", "chunked"])
def test_backends_on_a_gpu(backend):
    generator = torch.Generator().manual_seed(0)
    groups = [[300, 200, 333], [0, 128], [64, 1, 700, 64]]
    total = sum(map(sum, groups))
    q, k, v, up = (
        torch.randn(total, heads, 64, generator=generator).bfloat16().cuda().requires_grad_() for heads in (4, 2, 2, 4)
    )
    results = []
    for dtype, which in ((torch.bfloat16, backend), (torch.float64, "chunked")):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = packed_attention(*leaves, plan=plan_attention(branches=groups), backend=which)
        results.append([out, *torch.autograd.grad(out, leaves, up.detach().to(dtype))])
    for one, other in zip(*results, strict=True):
        # rounded to bfloat16: the weights, the output, and what is summed of gradients
        assert (one.double() - other).norm() <= 4 * torch.finfo(torch.bfloat16).eps * other.norm()


@pytest.mark.parametrize(
    ("branches", "message"),
    [([[3]], r"branches has \[3\]; a group is"), ([[2, -1]], r"branches has \[2, -1\]"), ([[]], r"branches has \[\]")],
)
def test_no_groups(branches, message):
    with pytest.raises(ValueError, match=message):
        plan_attention(branches=branches)


def test_bad_arguments():
    q = torch.zeros(5, 2, 4)
    plan = plan_attention(branches=[[2, 1, 2]])
    with pytest.raises(ValueError, match="causal=False with branches"):
        packed_attention(q, q, q, plan=plan, causal=False)
    with pytest.raises(ValueError, match="the documents have 5 tokens in all, q has 4"):
        packed_attention(q[:4], q[:4], q[:4], plan=plan)
    with pytest.raises(ValueError, match="a document has 4 tokens"):
        plan_attention(branches=[[2, 1, 2]], max_length=3)
    with pytest.raises(ValueError, match="got lengths and branches"):
        plan_attention(lengths=[5], branches=[[2, 1, 2]])
    with pytest.raises(TypeError, match="no interval"):
        plan.intervals(True, None, 5, torch.device("cpu"))
