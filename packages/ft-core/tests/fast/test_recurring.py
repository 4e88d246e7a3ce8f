"""Packed rows filled up to lengths that come again, and which steps are recorded; recordings themselves need a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ft_core import fast
from ft_core.fast import graphs as graphs_module
from ft_core.fast.documents import Batch
from ft_core.fast.graphs import AFTER, MOST, Graphs, Pace
from ft_core.fast.recurring import documents_plan, filled_up, recurring_length
from ft_core.fast.swap import BATCH


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

    def __init__(self) -> None:
        self.uses: list[Any] = []

    def stands(self) -> bool:
        return True

    def __call__(self, given: Any, turn: Any) -> Any:
        self.uses.append(given)
        return SimpleNamespace(turn=turn)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    made: list[Step] = []

    def record(self: Graphs, *_: Any) -> Step:
        made.append(Step())
        return made[-1]

    generator = SimpleNamespace(get_offset=lambda: 0, set_offset=lambda offset: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: generator})
    monkeypatch.setattr(graphs_module, "_fits", lambda device: True)
    monkeypatch.setattr(Graphs, "_record", record)
    return made


def ask(graphs: Graphs, size: int, key: Any = 1, worth: bool = True) -> Any:
    """A step of so many tokens, its backward pass done."""
    loss = graphs.loss(lambda: None, {"ids": torch.zeros(size)}, lambda: (key, None), None, lambda: worth)  # type: ignore
    if loss is not None:
        loss.turn.done = True
    return loss


def test_each_shape_is_recorded_once(recordings):
    graphs = Graphs()
    for _ in range(AFTER):
        assert ask(graphs, 64) is None
        assert ask(graphs, 128) is None
    for _ in range(3):
        assert ask(graphs, 64) is not None
        assert graphs.replays
        assert ask(graphs, 128) is not None
    assert [len(step.uses) for step in recordings] == [3, 3]
    for size in range(1000, 1000 + MOST):
        for _ in range(AFTER + 1):
            ask(graphs, size)
    assert graphs.recorded == MOST
    assert not graphs.replays
    assert graphs.reason is None
    assert ask(graphs, 64) is not None


def test_what_changes_is_recorded_anew(recordings):
    graphs = Graphs()
    for key in (1, 2):
        for _ in range(AFTER):
            assert ask(graphs, 64, key) is None
        assert ask(graphs, 64, key) is not None
    assert len(recordings) == 2
    assert ask(graphs, 64, key=1) is None


def test_one_step_is_under_way_at_a_time(recordings):
    graphs = Graphs()
    for size in (64, 128):
        for _ in range(AFTER + 1):
            ask(graphs, size)
    waiting = graphs.loss(lambda: None, {"ids": torch.zeros(64)}, lambda: (1, None), None)  # type: ignore
    assert ask(graphs, 64) is None
    assert ask(graphs, 128) is None
    waiting.turn.done = True
    assert ask(graphs, 128) is not None
    waiting = graphs.loss(lambda: None, {"ids": torch.zeros(64)}, lambda: (1, None), None)  # type: ignore
    del waiting  # nobody can ask for its gradients any more
    assert ask(graphs, 128) is not None


def test_what_gains_nothing_is_not_recorded(recordings):
    graphs = Graphs()
    for _ in range(3 * AFTER):
        assert ask(graphs, 64, worth=False) is None
    assert ask(graphs, 64) is not None


@pytest.mark.parametrize(("gpu", "expected"), [((1.05, 1.0), True), ((1.05, 3.0), False), ((3.0, 1.05), False)])
def test_the_pace_is_the_host_s_where_the_gpu_does_not_fall_behind(gpu, expected, monkeypatch):
    clock = {"host": 0.0, "gpu": 0.0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock["gpu"]

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(graphs_module.time, "perf_counter", lambda: clock["host"])
    pace = Pace()
    assert not pace.by_host()
    for seconds in (9.0, *gpu):  # the first, which compiles, is forgotten
        pace.begin()
        clock["host"] += 1.0
        clock["gpu"] += seconds
        pace.end()
    assert pace.by_host() == expected
