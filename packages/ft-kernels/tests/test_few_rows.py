"""Products with NF4 weights and attention over kept tokens, for few rows, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ft_kernels import NF4Weight, decode_attention, gather_rows, nf4_linear, rope_append, row_linear
from ft_kernels.dispatch import power_of_2
from ft_kernels.functional import few_rows
from ft_kernels.ops.nf4 import reference

ONE, SOME = "nf4_linear_one", "nf4_linear_some"
ATTENTION = ("decode_attention_parts", "decode_attention_together")
HALVES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(sizes, k, blocksize, nested, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        NF4Weight.quantize(
            torch.randn(n, k, generator=generator).mul(torch.rand(n, 1, generator=generator)).to(device), blocksize,
            nested=nested,
        )
        for n in sizes
    ]  # fmt: skip


def expanded(weight, dtype):
    """By the plain reference, whose bits test_nf4.py holds the kernel to: that takes the interpreter seconds."""
    nested = weight.nested
    tables, groups = ((None, None, None), 256) if nested is None else (
        (nested.absmax, nested.code, nested.offset), nested.blocksize
    )  # fmt: skip
    kind = torch.float32 if dtype == torch.float64 else dtype
    packed = weight.packed.contiguous().view(-1).view(torch.uint8)
    numbers = reference.dequantize(packed, weight.absmax, *tables, weight.shape, kind, weight.blocksize, groups)
    return numbers.to(dtype)


def check(x, weights, exact_enough, actual=None):
    if actual is None:
        actual = nf4_linear(x, weights if len(weights) > 1 else weights[0])
    exact = F.linear(x.double(), torch.cat([expanded(weight, torch.float64) for weight in weights]))
    eager = F.linear(x, torch.cat([expanded(weight, x.dtype) for weight in weights]))
    assert actual.dtype == x.dtype
    exact_enough("product", actual, eager, exact)


@settings(max_examples=12)
@given(
    rows=st.sampled_from([1, 1, 2, 5, 16, 33]), blocks=st.integers(1, 20),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), blocksize=st.sampled_from([32, 64, 128]),
    nested=st.booleans(), dtype=st.sampled_from(HALVES), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(rows=1, blocks=17, sizes=[40, 9, 33], blocksize=64, nested=True, dtype=torch.bfloat16, seed=0)
@example(rows=16, blocks=7, sizes=[40, 9, 33], blocksize=64, nested=True, dtype=torch.bfloat16, seed=1)
@example(rows=16, blocks=5, sizes=[70], blocksize=64, nested=False, dtype=torch.float16, seed=2)
def test_products(device, launched, exact_enough, rows, blocks, sizes, blocksize, nested, dtype, seed):
    """Nested scales only where a launch of the quantizer is not what is looked at."""
    k = blocks * blocksize
    weights = draw(sizes, k, blocksize, nested, device, seed)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    from ft_kernels.ops.nf4_linear import kernels

    tiling = kernels._tiling(min(rows, 2), k, max(16, power_of_2(rows)), sum(sizes), x.device)
    added = ["nf4_linear_add"] if tiling.get("SHARES", 1) > 1 else []
    with launched(ONE if rows == 1 else SOME, *added):
        actual = nf4_linear(x, weights if len(weights) > 1 else weights[0])
    check(x, weights, exact_enough, actual)


@pytest.mark.parametrize("processors", [1, 3, 100])
def test_several_programs_share_a_row(device, launched, monkeypatch, exact_enough, processors):
    """The last share is shorter than the others, or has nothing."""
    from ft_kernels import tuning
    from ft_kernels.ops.nf4_linear import kernels

    kernels._tiling.cache_clear()
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: processors)
    weights = draw([40, 30, 9], 64 * 149, 64, False, device, processors)
    x = torch.randn(3, 64 * 149, generator=torch.Generator().manual_seed(5)).to(device, torch.bfloat16)
    with launched(SOME, *([] if processors == 1 else ["nf4_linear_add"])):
        actual = nf4_linear(x, weights)
    check(x, weights, exact_enough, actual)
    kernels._tiling.cache_clear()


def test_products_of_rows_of_any_strides(device, launched, exact_enough):
    weights = draw([24, 8], 128, 64, True, device, 3)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(4)).to(device, torch.float16)
    for given_x in (x[..., :128], x[..., ::2], x[:1, :1, 128:]):
        actual = nf4_linear(given_x, weights)
        assert actual.shape == (*given_x.shape[:-1], 32)
        flat = given_x.reshape(-1, 128).contiguous()
        assert torch.equal(actual.view(-1, 32), nf4_linear(flat, weights))
        check(flat, weights, exact_enough)


@pytest.mark.parametrize(
    ("rows", "k", "dtype", "blocksize"),
    [
        (few_rows.MOST_ROWS + 1, 64, torch.bfloat16, 64),
        (2, 96, torch.bfloat16, 64),  # blocks that go on in the next row
        (2, 64, torch.float32, 64),
        (2, 256, torch.bfloat16, 256),
    ],
)
def test_what_the_kernel_is_not_for(device, launched, exact_enough, rows, k, dtype, blocksize):
    weights = draw([12, 20], k, blocksize, False, device, 5)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    with launched("nf4_dequantize"):
        nf4_linear(x, weights)
    check(x, weights, exact_enough)


def test_no_rows(device):
    weights = draw([12, 20], 64, 64, True, device, 5)
    assert nf4_linear(torch.zeros(0, 64, dtype=torch.bfloat16, device=device), weights).shape == (0, 32)


def test_more_than_three_weights(device, launched, exact_enough):
    weights = draw([8, 8, 8, 8], 64, 64, False, device, 7)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(8)).to(device, torch.bfloat16)
    with launched("nf4_dequantize"):
        nf4_linear(x, weights)
    check(x, weights, exact_enough)


def test_bad_arguments_of_the_product(device):
    (weight,) = draw([8], 64, 64, False, device, 9)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64; allowed are"):
        nf4_linear(torch.zeros(1, 64, dtype=torch.float64, device=device), weight)
    with pytest.raises(ValueError, match=r"x has shape \[1, 32\], a weight \(8, 64\)|\[8, 64\]; K must be the same"):
        nf4_linear(torch.zeros(1, 32, device=device), weight)
    with pytest.raises(ValueError, match="use one device"):
        nf4_linear(torch.zeros(1, 64, device="meta"), weight)
    elsewhere = NF4Weight(weight.packed, weight.absmax.to("meta"), weight.shape)
    with pytest.raises(ValueError, match="a weight is on meta, x on"):
        nf4_linear(torch.zeros(1, 64, device=device), elsewhere)
    with pytest.raises(ValueError, match="nf4_linear: there is no weight"):
        nf4_linear(torch.zeros(1, 64, device=device), [])


@settings(max_examples=12)
@given(
    k=st.sampled_from([2, 40, 512, 1100]), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    pad=st.sampled_from([0, 8]), dtype=st.sampled_from(HALVES), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(k=2500, sizes=[17, 5, 6], pad=16, dtype=torch.bfloat16, seed=0)
def test_one_row_of_16_bit_weights(device, launched, exact_enough, k, sizes, pad, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, k + pad, generator=generator).to(device, dtype)[:, :k] for n in sizes]
    x = torch.randn(1, k, generator=generator).to(device, dtype)
    with launched("row_linear"):
        actual = row_linear(x, weights)
    whole = torch.cat(weights)
    exact_enough("product", actual, F.linear(x, whole), F.linear(x.double(), whole.double()))


def test_what_is_left_to_torch(device, launched):
    weights = [torch.randn(n, 24, device=device) for n in (3, 4, 5, 6)]
    x = torch.randn(2, 3, 24, device=device)
    with launched():
        torch.testing.assert_close(row_linear(x, weights), F.linear(x, torch.cat(weights)))
        halves = [weight.half() for weight in weights[:2]]
        assert torch.equal(row_linear(x.half(), halves[0]), F.linear(x.half(), halves[0]))
        assert row_linear(x[:0].half(), halves).shape == (0, 3, 7)
        one = row_linear(x[0, :1], weights[0].t().contiguous().t())
    torch.testing.assert_close(one, F.linear(x[0, :1], weights[0]))
    with pytest.raises(TypeError, match=r"x has dtype torch\.float16, a weight torch\.float32"):
        row_linear(x.half(), weights)
    with pytest.raises(ValueError, match="K must be the same"):
        row_linear(x[..., :8], weights)
    with pytest.raises(ValueError, match="use one device"):
        row_linear(x, weights[0].to("meta"))
    with pytest.raises(ValueError, match="row_linear: there is no weight"):
        row_linear(x, [])


def attended(q, keys, values, lengths, window, scale):
    """Row by row in the tensors' dtype, as torch would do it."""
    out = torch.zeros_like(q)
    group = q.shape[1] // keys.shape[2]
    for row, length in enumerate(lengths.tolist()):
        begin = 0 if window is None else max(0, length - window)
        if length == begin:
            continue
        k, v = (t[row, begin:length].repeat_interleave(group, 1).transpose(0, 1) for t in (keys, values))
        scores = (q[row][:, None] @ k.transpose(1, 2)) * scale
        wide = torch.promote_types(q.dtype, torch.float32)
        out[row] = (scores.softmax(-1, dtype=wide).to(q.dtype) @ v)[:, 0]
    return out


def kept(rows, room, heads, groups, d, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return normal(rows, heads, d), normal(rows, room, groups, d), normal(rows, room, groups, d)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3), group=st.sampled_from([1, 2, 4, 7]),
    groups=st.integers(1, 2), d=st.sampled_from([16, 40, 64, 128]), window=st.sampled_from([None, 1, 50, 400]),
    dtype=st.sampled_from(HALVES), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(lengths=[300, 64, 65], group=4, groups=2, d=128, window=None, dtype=torch.bfloat16, seed=0)
@example(lengths=[0, 1], group=1, groups=1, d=64, window=None, dtype=torch.float16, seed=0)
def test_attention(device, launched, exact_enough, lengths, group, groups, d, window, dtype, seed):
    q, keys, values = kept(len(lengths), 300, group * groups, groups, d, dtype, device, seed)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    for row, length in enumerate(lengths):  # what lies behind is never read as a number
        keys[row, length:], values[row, length:] = math.nan, math.nan
    scale = 0.3
    with launched(*ATTENTION):
        actual = decode_attention(q, keys, values, counts, window=window, scale=scale)
    wide = [t.double() for t in (q, keys, values)]
    eager = attended(q, keys, values, counts, window, scale)
    exact_enough("attention", actual, eager, attended(*wide, counts, window, scale))


@pytest.mark.parametrize("processors", [1, 16, 400])
def test_parts_of_a_sequence(device, monkeypatch, exact_enough, processors):
    """However many there are, some of them empty."""
    from ft_kernels import tuning

    monkeypatch.setattr(tuning, "multiprocessors", lambda device: processors)
    q, keys, values = kept(2, 700, 4, 2, 64, torch.float16, device, 1)
    counts = torch.tensor([700, 130], dtype=torch.int32, device=device)
    for window in (None, 300):
        actual = decode_attention(q, keys, values, counts, window=window)
        wide = [t.double() for t in (q, keys, values)]
        eager = attended(q, keys, values, counts, window, 0.125)
        exact_enough("attention", actual, eager, attended(*wide, counts, window, 0.125))


def test_attention_in_fp32_and_by_views(device, launched):
    q, keys, values = kept(2, 40, 4, 2, 32, torch.float32, device, 2)
    counts = torch.tensor([40, 7], dtype=torch.int32, device=device)
    with launched():
        plain = decode_attention(q, keys, values, counts)
    torch.testing.assert_close(plain, attended(q, keys, values, counts, None, 32**-0.5), rtol=1e-5, atol=1e-6)
    both = torch.stack([keys, values], 2).half()  # [B, S, 2, G, D]
    packed = torch.cat([q.flatten(1), q.flatten(1)], 1).half()
    result = decode_attention(packed[:, :128].unflatten(1, (4, 32)), both[:, :, 0], both[:, :, 1], counts)
    assert torch.equal(result, decode_attention(q.half(), keys.half(), values.half(), counts))


def apart(x, dim, step, file):
    """x with `step` elements between neighbours along a dimension, in a file that is written nowhere else."""
    size = (x.shape[dim] - 1) * step + x.numel()
    file.truncate(max(size * x.itemsize, file.seek(0, 2)))
    memory = torch.from_file(file.name, shared=True, size=size, dtype=x.dtype)
    strides = list(torch.empty(x.select(dim, 0).shape).stride())
    strides.insert(dim % x.dim(), step)
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("step", [2**29 + 8, 2**30 + 8])  # three heads: beyond 2^31 bytes, beyond 2^31 elements
def test_heads_and_rows_far_apart(device, tmp_path, step):
    if device != "cpu":
        pytest.skip("needs memory that is only claimed, as files on a CPU have it")
    files = iter(range(9))

    def far(x, dim):
        with open(tmp_path / f"sparse{next(files)}", "w+b") as file:
            return apart(x, dim, step, file)

    q, keys, values = kept(1, 5, 3, 3, 16, torch.float16, device, 3)
    counts = torch.tensor([4], dtype=torch.int32)
    near = decode_attention(q, keys, values, counts)
    assert torch.equal(decode_attention(far(q, 1), far(keys, 2), far(values, 2), counts), near)
    tables = torch.randn(2, 9, 8).repeat(1, 1, 2)
    k, v = q * 2, q * 3
    there = [far(keys, 2), far(values, 2)]
    turned = rope_append(far(q, 1), far(k, 1), far(v, 1), *there, counts, *tables)
    assert torch.equal(turned, rope_append(q, k, v, keys, values, counts, *tables))
    assert torch.equal(there[0], keys)
    assert torch.equal(there[1], values)
    (weight,) = draw([8], 64, 64, True, device, 1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).half()
    assert torch.equal(nf4_linear(far(x, 0), weight), nf4_linear(x, weight))


@settings(max_examples=8)
@given(
    rows=st.integers(1, 3), groups=st.integers(1, 2), group=st.sampled_from([1, 3]), d=st.sampled_from([2, 24, 64]),
    dtype=st.sampled_from([*HALVES, torch.float32]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_turned_and_kept(device, launched, exact_enough, rows, groups, group, d, dtype, seed):
    """And nothing else is written; q, k and v lie in one row."""
    generator = torch.Generator().manual_seed(seed)
    heads, room = groups * group, 11
    packed = torch.randn(rows, heads + 2 * groups, d, generator=generator).to(device, dtype)
    q, k, v = packed.split([heads, groups, groups], 1)
    angles = torch.randn(room, d // 2, generator=generator).repeat(1, 2).to(device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    positions = torch.randint(room, (rows,), generator=generator).to(device, torch.int32)
    kept = torch.zeros(2, rows, room, groups, d, dtype=dtype, device=device)
    with launched(*(["rope_append"] if dtype != torch.float32 else [])):
        turned = rope_append(q, k, v, kept[0], kept[1], positions, cos, sin)
    where = torch.arange(rows, device=device), positions.long()

    def by_transformers(x, wide):
        """In its order of operations, in one dtype."""
        c, s = (table[positions.long()][:, None].to(wide) for table in (cos, sin))
        first, second = x.to(wide).chunk(2, -1)
        return x.to(wide) * c + torch.cat([-second, first], -1) * s

    for what, actual, x in (("q", turned, q), ("k", kept[0][where], k)):
        exact_enough(what, actual, by_transformers(x, dtype), by_transformers(x, torch.float64))
    assert torch.equal(kept[1][where], v)
    kept[0][where], kept[1][where] = 0, 0
    assert not kept.any()


def test_a_position_beyond_the_room_is_not_kept(device):
    q, kept = torch.ones(2, 1, 4, dtype=torch.float16, device=device), torch.zeros(2, 3, 1, 4, device=device).half()
    tables = torch.ones(5, 4, device=device), torch.zeros(5, 4, device=device)
    positions = torch.tensor([2, 3], dtype=torch.int32, device=device)
    rope_append(q, q, q, kept, kept.clone(), positions, *tables)
    assert kept[0, 2].eq(1).all()
    assert kept[0, :2].eq(0).all()
    assert kept[1].eq(0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 2, 16).half()}, TypeError, "not of one floating-point dtype"),
        ({"positions": torch.zeros(2)}, TypeError, "positions are torch.float32, expected torch.int32"),
        ({"v": torch.zeros(2, 3, 16)}, ValueError, r"k \[2, 2, 16\], v \[2, 3, 16\]"),
        ({"cos": torch.zeros(9, 8)}, ValueError, r"cos \[9, 8\]"),
        ({"q": torch.zeros(2, 16, 4).transpose(1, 2)}, ValueError, "must be contiguous"),
        ({"sin": torch.zeros(9, 16, device="meta")}, ValueError, "several devices"),
    ],
)
def test_bad_arguments_of_rope_append(change, error, message):
    kept = {"keys": torch.zeros(2, 8, 2, 16), "values": torch.zeros(2, 8, 2, 16)}
    given = {"q": torch.zeros(2, 4, 16), "k": torch.zeros(2, 2, 16), "v": torch.zeros(2, 2, 16), **kept}
    given |= {"positions": torch.zeros(2, dtype=torch.int32), "cos": torch.zeros(9, 16), "sin": torch.zeros(9, 16)}
    with pytest.raises(error, match=message):
        rope_append(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": torch.zeros(2, 8, 2, 16).half()}, TypeError, "q, keys and values have dtypes"),
        ({"lengths": torch.zeros(2, dtype=torch.long)}, TypeError, "lengths have dtype torch.int64, expected"),
        ({"q": torch.zeros(2, 3, 16)}, ValueError, r"q \[2, 3, 16\], keys \[2, 8, 2, 16\]"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, ValueError, r"lengths have shape \[3\]; q needs \[2\]"),
        ({"q": torch.zeros(2, 16, 4).transpose(1, 2)}, ValueError, "must be contiguous"),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "several devices"),
        ({"window": 0}, ValueError, "window=0; a window is 1 or more"),
    ],
)
def test_bad_arguments_of_attention(change, error, message):
    given = {"q": torch.zeros(2, 4, 16), "keys": torch.zeros(2, 8, 2, 16), "values": torch.zeros(2, 8, 2, 16)}
    given |= {"lengths": torch.zeros(2, dtype=torch.int32), **change}
    with pytest.raises(error, match=message):
        decode_attention(**given)


def test_what_wants_a_gradient_is_refused(device):
    (weight,) = draw([8], 64, 64, False, device, 9)
    q, keys, values = kept(1, 5, 2, 1, 16, torch.float16, device, 3)
    counts = torch.tensor([4], dtype=torch.int32, device=device)
    tables = torch.ones(2, 9, 16, device=device)
    x, plain = torch.ones(1, 64, device=device).half(), torch.ones(8, 64, device=device).half()

    def want(t):
        return t.clone().requires_grad_()

    calls = {
        "nf4_linear": lambda want: nf4_linear(want(x), weight),
        "row_linear": lambda want: row_linear(x, want(plain)),
        "decode_attention": lambda want: decode_attention(q, want(keys), values, counts),
        "rope_append": lambda want: rope_append(want(q), q[:, :1], q[:, :1], keys, values, counts, *tables),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: an argument requires a gradient"):
            call(want)
        with torch.no_grad():
            assert torch.equal(call(want), call(torch.clone))


def test_opcheck(device):
    from ft_kernels.ops.decode_attention.autograd import decode_attention_op, rope_append_op
    from ft_kernels.ops.nf4_linear.autograd import nf4_linear_op
    from ft_kernels.ops.row_linear.autograd import row_linear_op

    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    (weight,) = draw([8], 64, 64, True, device, 1)
    tensors = list(few_rows._tensors(weight))
    for rows in (1, 3):
        x = torch.randn(rows, 64, device=device, dtype=torch.float16)
        torch.library.opcheck(nf4_linear_op, (x, tensors, [8], 64, 256), test_utils=checks)
    q, keys, values = kept(2, 20, 4, 2, 16, torch.float16, device, 2)
    counts = torch.tensor([20, 7], dtype=torch.int32, device=device)
    torch.library.opcheck(decode_attention_op, (q, keys, values, counts, 0, 0.25), test_utils=checks)
    torch.library.opcheck(row_linear_op, (q[:1, 0], [keys[0, :, 0], keys[1, :, 1]]), test_utils=checks)
    tables = torch.ones(20, 16, device=device), torch.zeros(20, 16, device=device)
    given = (q, keys[:, 0].clone(), values[:, 0].clone(), keys, values, counts - 1, *tables)
    torch.library.opcheck(rope_append_op, given, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 50])
def test_at_the_size_of_a_model_and_recorded(device, launched, exact_enough, rows):
    """8B's widest product and attention, and the same again from a graph, with more tokens kept."""
    weights = draw([4096, 1024, 1024], 4096, 64, True, device, 3)
    x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
    check(x, weights, exact_enough)
    down = draw([4096], 14336, 64, True, device, 4)
    check(torch.randn(rows, 14336, device=device, dtype=torch.bfloat16), down, exact_enough)
    q, keys, values = kept(rows, 1024, 32, 8, 128, torch.bfloat16, device, 5)
    counts = torch.full((rows,), 100, dtype=torch.int32, device=device)

    def step():
        return nf4_linear(x, weights), decode_attention(q, keys, values, counts)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    counts.fill_(1000)
    x.normal_()
    graph.replay()
    for ours, again in zip(replayed, step(), strict=True):
        assert torch.equal(ours, again)
    wide = [t.double() for t in (q, keys, values)]
    eager = attended(q, keys, values, counts, None, 128**-0.5)
    exact_enough("attention", replayed[1], eager, attended(*wide, counts, None, 128**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("pinned", [False, True])
def test_rows_of_a_table_in_the_hosts_memory(device, dtype, pinned):
    """Copies, to the bit; a GPU reads a pinned table by itself."""
    if pinned and torch.device(device).type != "cuda":
        pytest.skip("memory is pinned for a GPU")
    table = torch.randn(37, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = table.pin_memory() if pinned else table
    index = torch.tensor([3, 0, 36, 3, 12], device=device)
    for which in (index, index.int(), index[:0]):
        rows = gather_rows(table, which)
        assert rows.device == index.device
        assert torch.equal(rows.cpu(), table[which.cpu()])
    on_device = table.to(device)
    assert torch.equal(gather_rows(on_device, index), on_device[index])
    wide = torch.randn(5, 6000, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    assert torch.equal(gather_rows(wide[:, ::2], index % 5), wide[:, ::2][index % 5])
