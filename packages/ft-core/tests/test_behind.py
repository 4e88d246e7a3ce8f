"""Logging a step behind the launch of the next leaves the same rows, whatever ends the training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TIMES = ("seconds", "tokens_per_second", "memory", "runtime", "samples_per_second", "steps_per_second")


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps on a CPU are logged behind, too, as on a GPU; the steps whose logging waited."""
    pytest.importorskip("trl")
    from trl import SFTTrainer

    from ft_core import fast
    from ft_core.training import behind as module

    monkeypatch.setattr(module, "DEVICES", ("cpu", "cuda"))
    waited: list[str] = []
    take = module.LogsBehindMixin._take

    def taken(self: Any, *args: Any) -> Any:
        waited.append(f"{self.state.global_step}")
        return take(self, *args)

    monkeypatch.setattr(module.LogsBehindMixin, "_take", taken)
    load = SFTTrainer.__init__

    def with_fast_layers(self: Any, model: Any = None, *args: Any, **named: Any) -> None:
        fast.enable(model)  # as on a GPU, where the loss is the fast path's and TRL counts nothing
        load(self, model, *args, **named)

    monkeypatch.setattr(SFTTrainer, "__init__", with_fast_layers)
    return waited


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_core.training import behind as module

    monkeypatch.setattr(module, "DEVICES", ())


def test_the_same_rows_and_the_same_state(
    ft: Any, configure: Any, tmp_path: Path, behind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 8, "save_every": 3, "eval_every": 5, "gradient_accumulation": 2, "max_grad_norm": 0.5}
    done = ft("train", configure(training=settings), "eval_split=5", f"output={tmp_path / 'one'}")
    assert done.code == 0, done.err
    assert behind == ["1", "2", "4", "7"]  # 3 and 6 are saved, 5 is measured, 8 is the last
    at_once(monkeypatch)
    done = ft("train", configure(training=settings), "eval_split=5", f"output={tmp_path / 'two'}")
    assert done.code == 0, done.err
    assert len(behind) == 4
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    lines = (tmp_path / "one" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [row["tokens_per_second"] for row in map(json.loads, lines) if row["kind"] == "train"][1:]
    assert max(rates) < 20 * min(rates)  # a row that followed at once had the rate of no time at all
    assert one == two
    assert [row["step"] for row in one if row["kind"] == "train"] == list(range(1, 9))
    histories = [
        json.loads((tmp_path / name / "checkpoints/checkpoint-6/trainer_state.json").read_text(encoding="utf-8"))
        for name in ("one", "two")
    ]
    for history in histories:
        history["log_history"] = [
            {key: value for key, value in entry.items() if key.removeprefix("eval_") not in TIMES}
            for entry in history["log_history"]
        ]
    assert histories[0]["log_history"] == histories[1]["log_history"]
    assert histories[0]["total_flos"] == histories[1]["total_flos"] > 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    assert summaries[0]["train_loss"] == summaries[1]["train_loss"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]


def test_what_was_not_said_is_said_when_something_ends_the_training(
    ft: Any, configure: Any, tmp_path: Path, behind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_core.training.trainer import RunTrainerMixin

    step: Callable[..., Any] = RunTrainerMixin.training_step

    def failing(self: Any, *args: Any, **named: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **named)

    monkeypatch.setattr(RunTrainerMixin, "training_step", failing)
    config = configure(training={"max_steps": 8, "save_every": 100})
    assert ft("train", config, f"output={tmp_path / 'run'}").code == 130
    assert behind == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_ends_it_a_step_later_and_before_anything_is_saved(
    ft: Any, configure: Any, tmp_path: Path, behind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_core.training.trainer import RunTrainerMixin

    step: Callable[..., Any] = RunTrainerMixin.training_step

    def broken(self: Any, *args: Any, **named: Any) -> Any:
        loss = step(self, *args, **named)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(RunTrainerMixin, "training_step", broken)
    config = configure(training={"max_steps": 8, "save_every": 5})
    done = ft("train", config, f"output={tmp_path / 'run'}")
    assert done.code == 2
    assert "loss is nan at step 4: lower training.learning_rate" in done.err
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] is None
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


def test_a_row_has_the_memory_of_its_own_step(
    ft: Any, configure: Any, tmp_path: Path, behind: list[str], monkeypatch: pytest.MonkeyPatch, metrics: Any
) -> None:
    """The third step takes more than the process ever had: no row before it says so."""
    from ft_core.models.device import peak_memory
    from ft_core.training.trainer import RunTrainerMixin

    on_gpu = torch.cuda.is_available()
    if not on_gpu and sys.platform != "linux":
        pytest.skip("needs /proc")
    step: Callable[..., Any] = RunTrainerMixin.training_step
    more = 2**26

    def growing(self: Any, *args: Any, **named: Any) -> Any:
        if self.state.global_step == 2 and on_gpu:
            torch.empty(peak_memory() - torch.cuda.memory_allocated() + 2 * more, dtype=torch.uint8, device="cuda")
        elif self.state.global_step == 2:
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            size = peak_memory() - pages * os.sysconf("SC_PAGE_SIZE") + 2 * more
            torch.ones(size, dtype=torch.uint8)  # each page is written to
        return step(self, *args, **named)

    monkeypatch.setattr(RunTrainerMixin, "training_step", growing)
    done = ft("train", configure(training={"max_steps": 5, "save_every": 100}))
    assert done.code == 0, done.err
    assert behind == ["1", "2", "3", "4"]
    memory = [row["memory"] for row in metrics(tmp_path / "run")]
    assert memory[1] + more < memory[2]


def test_what_trl_counts_of_the_next_step_stays_with_it(
    ft: Any, configure: Any, tmp_path: Path, behind: list[str], monkeypatch: pytest.MonkeyPatch, metrics: Any
) -> None:
    """Counted in every other step, as a trainer may whose loss is the fast path's only for some batches."""
    from ft_core.training.trainer import RunTrainerMixin

    step: Callable[..., Any] = RunTrainerMixin.training_step

    def counting(self: Any, *args: Any, **named: Any) -> Any:
        if self.state.global_step % 2:
            self._metrics["train"]["counted"].append(float(self.state.global_step + 1))
        return step(self, *args, **named)

    monkeypatch.setattr(RunTrainerMixin, "training_step", counting)
    done = ft("train", configure(training={"max_steps": 6, "save_every": 100}))
    assert done.code == 0, done.err
    assert behind == ["1", "3", "5"]
    assert [row.get("counted") for row in metrics(tmp_path / "run")] == [None, 2.0, None, 4.0, None, 6.0]


@pytest.mark.gpu
def test_a_norm_on_another_device_than_the_loss(tmp_path: Path) -> None:
    """As a model has it that is spread over several: here over a GPU and the CPU."""
    from transformers import Trainer, TrainingArguments

    from ft_core.training.behind import LogsBehindMixin

    class Behind(LogsBehindMixin, Trainer):
        logs_behind = True

    trainer = Behind(torch.nn.Linear(1, 1), TrainingArguments(tmp_path, report_to="none"))
    unsaid = trainer._take(torch.tensor(2.0, device="cuda"), torch.tensor(3.0), 0.0, 0.1)
    assert unsaid.ready is not None
    unsaid.ready.synchronize()
    assert unsaid.values.tolist() == [2.0, 3.0]


def test_what_a_callback_asks_for_when_a_step_is_logged_is_done(
    ft: Any, configure: Any, tmp_path: Path, behind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_core.training.callbacks import MetricsWriter

    on_log = MetricsWriter.on_log

    def asking(self: Any, args: Any, state: Any, control: Any, **named: Any) -> None:
        on_log(self, args, state, control, **named)
        if state.global_step == 2:
            control.should_save = True

    monkeypatch.setattr(MetricsWriter, "on_log", asking)
    config = configure(training={"max_steps": 5, "save_every": 100})
    assert ft("train", config, f"output={tmp_path / 'run'}").code == 0
    assert behind == ["1", "2", "4"]
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()  # the step that was under way by then
