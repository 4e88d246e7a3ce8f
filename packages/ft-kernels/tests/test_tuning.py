"""Launch settings: the table, and the search that runs only when asked for."""

from __future__ import annotations

import json

import pytest
import torch

from ft_kernels import dispatch, tuning

CUDA = torch.device("cuda", 0)
DEFAULT, OTHER, THIRD = {"BLOCK": 128, "num_warps": 4}, {"BLOCK": 256, "num_warps": 4}, {"BLOCK": 512, "num_warps": 8}
TRIALS = tuning.WARMUP + tuning.ROUNDS


class Event:
    """A CUDA event on a clock that the test turns."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = None

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def card(monkeypatch):
    """A GPU in name only."""
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(tuning._Tuner, "scratch", lambda self, device: torch.zeros(1))
    yield
    tuning.forget()


def launch(name, cost):
    """One launch: its settings, and the time that they take."""
    chosen = tuning.settings(name, CUDA, 4096, default=DEFAULT, candidates=[OTHER, THIRD, DEFAULT])
    with tuning.trial(name, CUDA):
        Event.now += cost[chosen["BLOCK"]]
    return chosen


def test_defaults_where_nothing_is_asked_for(card):
    assert tuning.settings("kernel", CUDA, default=DEFAULT, candidates=[OTHER]) == DEFAULT
    assert tuning.settings("kernel", torch.device("cpu"), default=DEFAULT, candidates=[OTHER]) == DEFAULT
    with tuning.autotune():
        assert tuning.settings("kernel", torch.device("cpu"), default=DEFAULT, candidates=[OTHER]) == DEFAULT
        assert tuning.settings("kernel", CUDA, default=DEFAULT) == DEFAULT


def test_what_is_returned_is_the_callers(card):
    tuning.settings("kernel", CUDA, default=DEFAULT)["BLOCK"] = 1
    assert DEFAULT["BLOCK"] == 128


def test_the_table_overrides(card, monkeypatch):
    monkeypatch.setitem(tuning.TABLE, "hopper", {"kernel": {"num_warps": 8}})
    assert tuning.settings("kernel", CUDA, default=DEFAULT) == {"BLOCK": 128, "num_warps": 8}
    assert tuning.settings("another", CUDA, default=DEFAULT) == DEFAULT


@pytest.mark.parametrize(
    ("capability", "family", "shared"),
    [
        ((7, 5), "turing", 64), ((8, 0), "ampere", 163), ((8, 6), "ada", 99), ((8, 9), "ada", 99),
        ((9, 0), "hopper", 227), ((10, 0), "blackwell", 227), ((12, 0), "blackwell", 99), ((0, 0), "other", 64),
    ],
)  # fmt: skip
def test_families(monkeypatch, capability, family, shared):
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    assert tuning.family(CUDA) == family
    assert tuning.shared_memory(CUDA) == shared << 10


def test_autotune_finds_the_fastest_and_stops(card):
    cost = {128: 3.0, 256: 1.0, 512: 2.0}
    with tuning.autotune():
        tried = [launch("kernel", cost)["BLOCK"] for _ in range(3 * TRIALS)]
        assert tried == [128] * TRIALS + [256] * TRIALS + [512] * TRIALS
        assert launch("kernel", cost) == OTHER
    assert launch("kernel", cost) == OTHER
    tuning.forget()
    assert launch("kernel", cost) == DEFAULT


def test_a_candidate_that_fails_is_not_chosen(card):
    cost = {128: 3.0, 512: 2.0}
    with tuning.autotune():
        for _ in range(3 * TRIALS):
            try:
                launch("kernel", cost)
            except KeyError:
                continue
        assert launch("kernel", cost) == THIRD


def test_capturing_a_graph_is_no_trial(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tuning.autotune():
        assert [launch("kernel", {128: 1.0})["BLOCK"] for _ in range(50)] == [128] * 50


def test_a_file_keeps_what_was_found(card, tmp_path):
    file = tmp_path / "settings.json"
    cost = {128: 3.0, 256: 1.0, 512: 2.0}
    with tuning.autotune(file=file):
        for _ in range(3 * TRIALS):
            launch("kernel", cost)
    (line,) = json.loads(file.read_text())
    assert line == {"device": "a card", "kernel": "kernel", "key": "4096", "settings": OTHER}
    tuning.forget()
    with tuning.autotune(enabled=False, file=file):
        assert launch("kernel", cost) == OTHER
    # What a file says is taken only where the kernel still offers it.
    assert tuning.settings("kernel", CUDA, 4096, default=DEFAULT, candidates=[THIRD]) == DEFAULT
    tuning.forget()
    with tuning.autotune(file=file):
        for _ in range(3 * TRIALS):
            launch("second", cost)
    assert [line["kernel"] for line in json.loads(file.read_text())] == ["kernel", "second"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="does not hold launch settings"):
        tuning.autotune(file=file)
    assert file.read_text() == '{"a": 1}'
    assert not tuning._state.enabled


def test_a_launch_of_another_kernel_is_no_trial(card):
    with tuning.autotune():
        tuning.settings("kernel", CUDA, default=DEFAULT, candidates=[OTHER])
        with tuning.trial("another", CUDA):
            pass
        (search,) = tuning._state.searches.values()
        assert search.issued == 0


@pytest.mark.gpu
def test_autotune_on_a_gpu(device):
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, n, BLOCK: tl.constexpr):
        cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + cols, 2 * tl.load(x + cols, mask=cols < n), mask=cols < n)

    x = torch.ones(1 << 20, device=device)
    candidates = [{"BLOCK": 64, "num_warps": 1}, {"BLOCK": 2048, "num_warps": 8}]
    with tuning.autotune():
        for _ in range(3 * TRIALS + 1):
            chosen = tuning.settings("double", x.device, default={"BLOCK": 32, "num_warps": 1}, candidates=candidates)
            dispatch.launch(
                "double", double, (triton.cdiv(x.numel(), chosen["BLOCK"]),), x.device, x, x.numel(), **chosen
            )
    # In place, and launched exactly as often as it was asked to.
    assert torch.equal(x, torch.full_like(x, 2.0 ** (3 * TRIALS + 1)))
    assert tuning.settings("double", x.device, default={"BLOCK": 32, "num_warps": 1}, candidates=candidates) != {
        "BLOCK": 32,
        "num_warps": 1,
    }
    tuning.forget()
