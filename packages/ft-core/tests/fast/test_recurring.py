"""Packed rows filled up to lengths that come again, and which steps are recorded; recordings themselves need a GPU."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ft_core import fast
from ft_core.fast import graphs as graphs_module
from ft_core.fast.documents import BATCH, Batch
from ft_core.fast.graphs import AFTER, MOST, Graphs, Pace
from ft_core.fast.recurring import documents_plan, filled_up, recurring_length


@pytest.mark.parametrize("total", [1, 63, 64, 65, 1000, 1024, 1025, 4095, 4097, 7777, 100_000])
def test_lengths_come_again_and_waste_little(total):
    length = recurring_length(total)
    assert total <= length <= max(total * (1 + 1 / 16), total + 63)
    assert recurring_length(length) == length
    assert len({recurring_length(n) for n in range(4097, 8193)}) == 16


def test_a_row_that_is_filled_up_is_the_row():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    path = fast.enable(model)
    lengths = [40, 17, 30]
    ids = torch.randint(97, (1, 87))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(ids: Any, labels: Any, **keywords: Any) -> Any:
        hidden = path.model.model(input_ids=ids, use_cache=False, **keywords).last_hidden_state
        from ft_core.fast.head import loss_of

        loss = loss_of(path.model.lm_head, path.layout, hidden, labels)
        return loss.detach(), torch.autograd.grad(loss, trained)

    loss, gradients = step(ids, labels, position_ids=positions, document_lengths=lengths)
    given = filled_up(ids, labels, positions, lengths)
    assert (
        given["ids"].shape == given["labels"].shape == given["positions"].shape == given["documents"].shape == (1, 128)
    )
    assert (given["labels"][0, 87:] == -100).all()
    assert given["documents"][0].tolist() == [i for n in (*lengths, 41) for i in range(n)]
    batch = Batch(documents_plan(given["documents"]))
    filled_loss, filled = step(given["ids"], given["labels"], position_ids=given["positions"], **{BATCH: batch})
    assert torch.allclose(loss, filled_loss, rtol=1e-6)
    for one, two in zip(gradients, filled, strict=True):
        assert (one - two).norm() <= 2e-6 * one.norm()


class Step:
    """Stands for a recorded step; what it gives is a loss that knows its use."""

    def __init__(self, size: int) -> None:
        self.size, self.uses = size, 0

    def stands(self) -> bool:
        return True

    def __call__(self, given: Any, turn: Any) -> Any:
        self.uses += 1
        return SimpleNamespace(turn=turn)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The recordings that are made; of 13 tokens none can be."""
    made: list[Step] = []

    def record(compute: Any, given: Any, model: Any, shared: Any, fresh: bool) -> Step:
        size = given["ids"].numel()
        if size == 13:
            raise RuntimeError("waits for the GPU")
        if size == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        made.append(Step(size))
        return made[-1]

    generator = SimpleNamespace(get_offset=lambda: 0, set_offset=lambda offset: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: generator})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(graphs_module, "as_it_was", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graphs_module, "_fits", lambda device: True)
    monkeypatch.setattr(graphs_module, "_Step", record)
    return made


def ask(graphs: Graphs, size: int, key: Any = 1, worth: bool = True) -> Any:
    """A step of so many tokens, its backward pass done."""
    loss: Any = graphs.loss(_never, {"ids": torch.zeros(size)}, lambda: (key, None), torch.nn.Module(), lambda: worth)
    if loss is not None:
        loss.turn.done = True
    return loss


def _never() -> torch.Tensor:
    raise AssertionError


def test_each_shape_is_recorded_once(recordings):
    graphs = Graphs()
    for _ in range(AFTER):
        assert ask(graphs, 128) is None
        assert ask(graphs, 64) is None
    for _ in range(3):
        assert ask(graphs, 128) is not None
        assert graphs.replays
        assert ask(graphs, 64) is not None
    assert [(step.size, step.uses) for step in recordings] == [(128, 3), (64, 3)]
    for size in range(20, 20 + MOST):
        for _ in range(AFTER + 1):
            ask(graphs, size)
    assert graphs.recorded == MOST
    assert not graphs.replays
    assert graphs.reason is None
    assert ask(graphs, 64) is not None


def test_the_longest_is_recorded_first(recordings):
    """A shorter one's memory is cut from it; those recorded before make way, and come again."""
    graphs = Graphs()
    pools = []
    for size in (64, 96, 128):
        for _ in range(AFTER + 1):
            ask(graphs, size)
        pools.append(graphs._shared)
    assert len({id(pool) for pool in pools}) == 3
    assert [step.size for step in recordings] == [64, 96, 128]
    assert ask(graphs, 64) is not None  # it came often enough before
    assert ask(graphs, 96) is not None
    assert graphs._shared is pools[-1]
    assert [step.size for step in recordings] == [64, 96, 128, 64, 96]


def test_what_changes_is_recorded_anew(recordings):
    graphs = Graphs()
    pools = []
    for key in (1, 2):
        for _ in range(AFTER):
            assert ask(graphs, 64, key) is None
        assert ask(graphs, 64, key) is not None
        pools.append(graphs._shared)
    assert pools[0] is not pools[1]  # nothing can be recorded into the memory of recordings that are gone
    assert len(recordings) == 2
    assert ask(graphs, 64, key=1) is None


@pytest.mark.parametrize(("size", "reason"), [(13, "RuntimeError: waits"), (7, "too little memory is free")])
def test_a_shape_that_cannot_be_recorded_leaves_the_others(recordings, size, reason):
    graphs = Graphs()
    for which in (64, size):
        for _ in range(AFTER + 3):
            ask(graphs, which)
    assert graphs.reason is not None
    assert graphs.reason.startswith(reason)
    assert graphs.recorded == 2  # one was tried once, and not again
    assert ask(graphs, 64) is not None
    assert ask(graphs, size) is None


def test_one_step_is_under_way_at_a_time(recordings):
    graphs = Graphs()

    def begin(size: int) -> Any:
        return graphs.loss(_never, {"ids": torch.zeros(size)}, lambda: (1, None), torch.nn.Module())

    for size in (128, 64):
        for _ in range(AFTER + 1):
            ask(graphs, size)
    waiting = begin(64)
    assert ask(graphs, 64) is None
    assert ask(graphs, 128) is None
    waiting.turn.done = True
    assert ask(graphs, 128) is not None
    waiting = begin(64)
    del waiting  # nobody can ask for its gradients any more
    assert ask(graphs, 128) is not None


def test_what_gains_nothing_is_not_recorded(recordings):
    graphs = Graphs()
    for _ in range(3 * AFTER):
        assert ask(graphs, 64, worth=False) is None
    assert ask(graphs, 64) is not None


def test_a_model_can_be_saved_whole(recordings):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1))
    path = fast.enable(model)
    for _ in range(AFTER + 1):
        ask(path.graphs, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = fast.fast_path_of(torch.load(file, weights_only=False))
    assert again is not None
    assert not again.graphs._steps
    assert not again.pace.by_host(64)


@pytest.mark.parametrize(
    ("gpu", "reached", "expected"),
    [((1.05, 1.0), True, True), ((1.05, 3.0), True, False), ((3.0, 1.05), True, False), ((1.0, 1.0), False, False)],
)
def test_the_pace_is_the_host_s_where_the_gpu_does_not_fall_behind(gpu, reached, expected, monkeypatch):
    """Nor has not even begun when all is launched: then the host has waited for room in the queue."""
    clock = {"host": 0.0, "gpu": 0.0, "reached": True}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self, stream: Any) -> None:
            self.at = clock["gpu"]

        def query(self) -> bool:
            return bool(clock["reached"])

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs_module.time, "perf_counter", lambda: clock["host"])
    device, pace = torch.device("cuda"), Pace()
    assert not pace.by_host(64)
    for seconds in (9.0, *gpu):  # the first, which compiles, is forgotten
        pace.begin(device)
        clock["host"] += 1.0
        clock["gpu"] += seconds
        clock["reached"] = reached
        pace.end(device, 64)
        clock["reached"] = True
    assert pace.by_host(64) == expected
    assert not pace.by_host(128)
