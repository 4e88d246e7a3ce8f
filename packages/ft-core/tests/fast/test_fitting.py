"""What each layer keeps under a bound of memory: the arithmetic, and its use on a GPU whose memory is played."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_core.fast import choose
from ft_core.fast.again import CHOICES
from ft_core.fast.choose import WORK, Chooser, Sizes, fit
from ft_core.fast.offload import Pool

GIB, MIB = 2**30, 2**20
LAYOUT: Any = SimpleNamespace(heads=32, kv_heads=8, head_dim=128)
TEXT = SimpleNamespace(hidden_size=4096, intermediate_size=14336)
SIZES = Sizes.of(LAYOUT, TEXT, True, ranks=112)


def test_sizes_are_those_of_the_blocks():
    """As the docstrings of attention_block and mlp_block have them, for the shape of Llama 3.1 8B."""
    attention = (4096 + 4096 + 2 * 1024 + 48 + 16) * 2 + 4 + (4096 * 2 + 4 * 32)
    mlp = (4096 + 2 * 14336 + 32 + 16) * 2 + 4
    assert SIZES.kept["keep"] == attention + mlp
    inputs = (4096 + 48 + 16) * 2 + (4096 * 2 + 4 * 32) + (4096 + 32 + 16) * 2
    assert SIZES.kept["inputs"] == inputs + 8  # the norms' 1/rms is counted here too
    assert SIZES.host == {"offload": 3 * 4096 * 2, "offload-input": 4096 * 2}
    assert SIZES.kept["offload"] == SIZES.kept["inputs"] - SIZES.host["offload"]
    assert SIZES.kept["offload-input"] == 0
    assert SIZES.kept["recompute"] == 4096 * 2


@pytest.mark.parametrize("host", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("room", [0.0, 0.002, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_the_fastest_that_fits(room, host):
    """Against all ways there are, for five layers."""
    layers, tokens = 5, 1000
    most = int(room * layers * tokens * SIZES.kept["keep"])
    there = int(host * layers * tokens * SIZES.host["offload"])

    def used(way):
        return sum(tokens * SIZES.kept[choice] for choice in way)

    def moved(way):
        return sum(tokens * SIZES.host.get(choice, 0) for choice in way)

    def work(way):
        return sum(WORK[choice] for choice in way)

    ways = [way for way in itertools.combinations_with_replacement(CHOICES, layers) if moved(way) <= there]
    found = fit(layers, tokens, most, SIZES, there)
    assert len(found) == layers
    assert moved(found) <= there
    if any(used(way) <= most for way in ways):
        assert used(found) <= most
        assert work(found) == pytest.approx(min(work(way) for way in ways if used(way) <= most))
    else:
        assert used(found) == min(used(way) for way in ways)


def test_the_last_layers_keep_the_most():
    found = fit(6, 1000, int(2.4 * 1000 * SIZES.kept["keep"]), SIZES, GIB)
    assert found == sorted(found, key=["offload-input", "offload", "recompute", "inputs", "keep"].index)
    assert found[-1] == "keep"
    assert found[0] == "offload"


class Gpu:
    """Memory in use, as torch would count it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, used: int) -> None:
        self.total, self.used, self.peak = total, used, used
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.used)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.used)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.used, self.total))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)

    def step(self, chooser: Chooser, tokens: int, beside: int, host: int = 100 * GIB, disk: int = 0) -> list[Any]:
        """A batch that takes so much beside what its layers keep; it must fit."""
        chosen = chooser.begin(tokens, torch.device("cuda", 0), lambda wanted: min(wanted, host), 0, lambda: disk)
        kept = sum(tokens * SIZES.kept[choice] for choice in chosen)
        self.peak = max(self.peak, self.used + kept + beside)
        assert self.used + kept + beside <= self.total
        x = torch.ones(1, requires_grad=True)
        output = x * 2
        chooser.watch(output)
        output.backward()
        return list(chosen)


def chooser_for(layers: int = 32) -> Chooser:
    return Chooser(lambda: SIZES, layers, lambda: 42 * 10**6)


def test_with_much_memory_all_is_kept_at_once(monkeypatch):
    gpu, chooser = Gpu(monkeypatch, 80 * GIB, 15 * GIB), chooser_for()
    assert gpu.step(chooser, 4096, GIB) == ["keep"] * 32
    assert gpu.step(chooser, 1024, GIB) == ["keep"] * 32
    assert chooser.recordable(4096)
    assert chooser.head == GIB


def test_a_batch_beside_which_more_is_kept_is_looked_at_anew(monkeypatch):
    """Of as many tokens, but of more images, of which a tower that is trained keeps something."""
    gpu, chooser = Gpu(monkeypatch, 80 * GIB, 15 * GIB), chooser_for()
    varying = Chooser(lambda: SIZES, 32, lambda: 42 * 10**6, True)
    for one in (chooser, varying):
        assert gpu.step(one, 4096, GIB) == ["keep"] * 32
    gpu.used += 55 * GIB
    with pytest.raises(AssertionError):  # which does not fit
        gpu.step(chooser, 4096, GIB)
    assert "keep" not in gpu.step(varying, 4096, GIB)
    gpu.used -= 55 * GIB
    assert gpu.step(varying, 4096, GIB).count("keep") == 32


def test_with_little_memory_the_first_batch_is_lean_and_the_rest_is_spent(monkeypatch):
    gpu, chooser = Gpu(monkeypatch, 24 * GIB, 15 * GIB), chooser_for()
    assert gpu.step(chooser, 4096, GIB) == ["inputs"] * 32
    gpu.used += 300 * MIB  # the optimizer's state
    second = gpu.step(chooser, 4096, GIB)
    assert second.count("keep") > 10
    free = (24 - 15 - 1) * GIB - 300 * MIB - sum(4096 * SIZES.kept[choice] for choice in second)
    assert free - 24 * GIB * choose.MARGIN < 4096 * SIZES.kept["keep"]  # no room for one more
    assert gpu.step(chooser, 4096, GIB) == second
    assert not chooser.recordable(4096)
    shorter = gpu.step(chooser, 2048, GIB)
    assert shorter.count("keep") > second.count("keep")


def test_a_loop_that_resets_the_highest_use_is_measured_all_the_same(monkeypatch):
    chosen = []
    for reset in (False, True):
        gpu, chooser = Gpu(monkeypatch, 24 * GIB, 15 * GIB), chooser_for()
        for _ in range(3):
            chosen.append(gpu.step(chooser, 4096, 2 * GIB))
            if reset:
                gpu.peak = gpu.used
    assert chosen[:3] == chosen[3:]


def test_a_batch_that_is_longer_than_measured_is_measured_anew(monkeypatch):
    gpu, chooser = Gpu(monkeypatch, 24 * GIB, 15 * GIB), chooser_for()
    gpu.step(chooser, 4096, GIB)
    gpu.step(chooser, 4096, GIB)
    assert gpu.step(chooser, 12288, 3 * GIB) == ["offload"] * 32
    longer = gpu.step(chooser, 12288, 3 * GIB)
    assert 0 < longer.count("keep") < 10


def test_without_room_on_the_host_whole_layers_are_computed_again(monkeypatch):
    gpu, chooser = Gpu(monkeypatch, 22 * GIB, 15 * GIB), chooser_for()
    assert gpu.step(chooser, 16384, 2 * GIB, host=0) == ["recompute"] * 32
    gpu, chooser = Gpu(monkeypatch, 22 * GIB, 15 * GIB), chooser_for()
    assert gpu.step(chooser, 16384, 2 * GIB, host=5 * GIB) == ["offload-input"] * 32


def test_a_first_batch_whose_layers_would_not_fit_one_by_one_goes_in_tiles(monkeypatch):
    """A layer of 65536 tokens takes 10 GiB beside what waits; in a trainer of somebody else nobody said so before."""
    for free, tiles in ((60, False), (7, True)):
        gpu, chooser = Gpu(monkeypatch, (10 + free) * GIB, 10 * GIB), chooser_for()
        gpu.step(chooser, 4096, GIB)
        assert not chooser.tiles
        gpu.step(chooser, 65536, 4 * GIB)
        assert chooser.tiles is tiles
    from transformers import LlamaConfig, LlamaForCausalLM

    from ft_core import fast

    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = fast.enable(LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).train())
    ids = torch.randint(97, (2, 10))
    path.model(input_ids=ids, labels=ids)
    assert path.tile is None
    path.chooser.tiles = True
    path.model(input_ids=ids, labels=ids)
    assert path.tile == choose.TILE
    path.tile = 1024
    path.model(input_ids=ids, labels=ids)
    assert path.tile == 1024


def test_the_disk_is_the_last_resort(monkeypatch):
    """16 GiB of inputs where 7 are free on the GPU, 5 on the host, and then enough on the disk."""
    tokens, each = 65536, 65536 * SIZES.host["offload-input"]
    gpu, chooser = Gpu(monkeypatch, 24 * GIB, 10 * GIB), chooser_for()
    beside = 9 * GIB
    for _ in range(2):
        chosen = gpu.step(chooser, tokens, beside, host=5 * GIB, disk=100 * GIB)
        assert set(chosen) == {"recompute", "offload-input"}
        assert 5 * GIB < chooser.in_host(tokens) < 32 * each
    assert chooser.in_host(tokens) == chosen.count("offload-input") * each
    with_more = gpu.step(chooser_for(), tokens, beside, host=16 * GIB, disk=100 * GIB)
    assert sum(SIZES.host.get(choice, 0) for choice in with_more) * tokens <= 16 * GIB


def test_a_wish_for_the_host_takes_less_of_it_where_it_must():
    chooser = chooser_for()
    chooser.want(["offload"] * 30 + ["keep"] * 2, None)
    device = torch.device("cpu")
    assert chooser.begin(4096, device, lambda wanted: min(wanted, 2 * GIB)) == ["offload-input"] * 30 + ["keep"] * 2
    assert chooser.begin(2048, device, lambda wanted: min(wanted, 2 * GIB)) == ["offload"] * 30 + ["keep"] * 2


def test_a_cap_holds_whatever_is_free(monkeypatch):
    gpu, chooser = Gpu(monkeypatch, 80 * GIB, 15 * GIB), chooser_for()
    cap = int(16.9 * GIB)
    chooser.want("auto", cap)
    beside = 800 * MIB
    for _ in range(3):
        chosen = gpu.step(chooser, 4096, beside)
    assert gpu.peak <= cap
    assert set(chosen) > {"offload"}
    assert chooser.head < GIB
    assert not chooser.recordable(4096)


def test_what_loading_took_does_not_count(monkeypatch):
    """The highest use was before the first batch, so its own is not seen: it is counted."""
    gpu, chooser = Gpu(monkeypatch, 24 * GIB, 15 * GIB), chooser_for()
    gpu.peak = 23 * GIB
    gpu.step(chooser, 4096, 700 * MIB)
    assert gpu.step(chooser, 4096, 700 * MIB).count("keep") > 5


def test_more_memory_in_use_is_noticed(monkeypatch):
    gpu, chooser = Gpu(monkeypatch, 24 * GIB, 15 * GIB), chooser_for()
    gpu.step(chooser, 4096, GIB)
    before = gpu.step(chooser, 4096, GIB)
    gpu.used += 2 * GIB
    assert gpu.step(chooser, 4096, GIB).count("keep") < before.count("keep")


@pytest.mark.parametrize("wanted", ["auto", "keep"])
def test_after_a_batch_that_did_not_fit_little_is_kept_until_that_is_measured(monkeypatch, wanted):
    gpu, chooser = Gpu(monkeypatch, 40 * GIB, 15 * GIB), chooser_for()
    chooser.want(wanted, None)
    assert gpu.step(chooser, 4096, GIB) == ["keep"] * 32
    chooser.tighten(torch.device("cuda", 0), 0.9)
    cap = int(0.9 * 40 * GIB * (1 - choose.MARGIN))
    assert chooser.cap == cap
    assert gpu.step(chooser, 4096, GIB) == ["offload"] * 32
    gpu.peak = 0
    second = gpu.step(chooser, 4096, GIB)
    assert second.count("keep") > 10
    assert gpu.peak <= cap
    assert gpu.step(chooser, 5000, GIB) == ["offload"] * 32  # longer than what was measured
    assert not chooser.recordable(4096)
    chooser.tighten(torch.device("cuda", 0), 0.8, 2**26)
    gpu.step(chooser, 4096, GIB)
    assert chooser.cap < 0.9 * cap
    assert chooser.head == 2**26
    chooser.want("auto", None)
    assert gpu.step(chooser, 4096, GIB) == ["keep"] * 32
    assert chooser.head == GIB


def test_a_tighter_plan_for_a_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    from ft_core import fast
    from ft_core.fast.tighten import tighten

    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = fast.enable(LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).train())
    graphs, cpu = path.graphs, torch.device("cpu")
    graphs._steps["a shape"], graphs.documents = object(), True  # type: ignore[assignment]
    assert tighten(path, 65536, cpu) == "as little kept as can be, tiles of 4096 tokens"
    assert path.tile == 4096
    assert path.graphs is graphs
    assert not graphs._steps  # given up, and its memory with it
    assert graphs.documents  # what was asked for still holds
    ids = torch.randint(97, (2, 10))
    path.model(input_ids=ids, labels=ids).loss.backward()
    assert path.chooser.chosen == ["recompute"] * 2
    assert tighten(path, 65536, cpu).endswith("64 MiB of logits at a time, tiles of 2048 tokens")
    assert path.chooser.head == 2**26
    path.tile = 1024
    tighten(path, 65536, cpu)
    assert path.tile == 1024


def test_buffers_are_used_again_and_bounded():
    pool = Pool(pinned=False, most=80 * MIB)
    buffers = [pool.take(3 * MIB) for _ in range(20)]
    places = {buffer.data_ptr() for buffer in buffers}
    assert len(places) == 20
    assert pool.bytes == 64 * MIB
    for buffer in buffers:
        pool.give(buffer)
    assert pool.take(3 * MIB - 5).data_ptr() in places  # nearly the same length
    assert pool.take(2 * MIB).numel() == 2 * MIB
    assert pool.bytes == 80 * MIB
    assert pool.room == 80 * MIB


def test_sizes_that_are_not_in_use_make_way():
    pool = Pool(pinned=False, most=32 * MIB)
    for size in (2 * MIB, 3 * MIB, 4 * MIB, 7 * MIB):
        pool.give(pool.take(size))
    assert pool.bytes <= 32 * MIB
