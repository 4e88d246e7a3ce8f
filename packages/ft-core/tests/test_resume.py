"""A run that is killed or interrupted goes on to the losses of one that is not, to the last digit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

STEPS = 24
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def setup(tiny: Path, tmp_path_factory: pytest.TempPathFactory, sums: Any, write_rows: Any) -> Path:
    """A folder with a configuration (dropout, held-out rows) and, in `whole`, its run that nobody interrupted."""
    from ft_core.training import train

    folder = tmp_path_factory.mktemp("resume")
    write_rows(folder / "rows.jsonl", sums(120))
    values = {
        "model": str(tiny),
        "data": str(folder / "rows.jsonl"),
        "eval_split": 5,
        "max_length": 32,
        "lora": {"r": 8, "dropout": 0.1},
        "training": {
            "max_steps": STEPS,
            "batch_size": 1,
            "gradient_accumulation": 2,
            "learning_rate": 5.0e-3,
            "save_every": SAVE_EVERY,
            "eval_every": 8,
        },
        "output": str(folder / "whole"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train(values, say=lambda line: None)
    return folder


@pytest.fixture
def words(setup: Path, tmp_path: Path) -> list[object]:
    """What to give `ft` to train that configuration into `tmp_path/run`."""
    return ["train", setup / "config.yaml", f"output={tmp_path / 'run'}"]


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def checkpoints(run: Path) -> list[str]:
    return sorted((p.name for p in (run / "checkpoints").iterdir()), key=lambda name: (len(name), name))


def kill_when(process: Any, condition: Callable[[], bool]) -> bool:
    """Kill a process as soon as the condition holds; False if it ended before."""
    while process.running:
        if condition():
            os.kill(process.pid, signal.SIGKILL)
            process.process.join()
            return process.process.exitcode == -signal.SIGKILL
        time.sleep(0.001)  # the process wants the core
    return False


def check_same(run: Path, whole: Path, metrics: Any, rounding: float) -> None:
    for kind in ("train", "eval"):
        mine, theirs = metrics(run, kind), metrics(whole, kind)
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], rel=rounding, abs=0)
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in metrics(run)] == [row["tokens"] for row in metrics(whole)]
    mine, theirs = (json.loads((r / "evaluation.json").read_text(encoding="utf-8")) for r in (run, whole))
    if not rounding:
        weights = "adapter/adapter_model.safetensors"
        assert (run / weights).read_bytes() == (whole / weights).read_bytes()
        assert mine == theirs
    assert mine["metrics"]["loss"] == pytest.approx(theirs["metrics"]["loss"], rel=rounding, abs=0)
    assert not list(run.rglob("*.partial*"))


def test_the_loss_falls_and_dropout_is_at_work(setup: Path, losses: Any) -> None:
    """Else equal losses would prove little."""
    values = [float(loss) for _, loss in losses(setup / "whole")]
    assert len(set(values)) == STEPS
    assert sum(values[-4:]) < sum(values[:4])


def test_killed_at_random_steps_and_while_a_checkpoint_is_written(
    setup: Path, words: list[object], tmp_path: Path, start_ft: Any, metrics: Any, rounding: float
) -> None:
    run = tmp_path / "run"
    partial = run / "checkpoints" / ".partial"
    draw = random.Random(0)

    def writing() -> bool:
        try:
            return any(any(folder.iterdir()) for folder in partial.iterdir())
        except OSError:
            return False

    cut_short = 0
    for kill in range(4):
        process = start_ft(*words, *(["--resume"] if kill else []))
        if kill % 2:
            assert kill_when(process, writing)
            cut_short += partial.is_dir()
        else:
            step = kill // 2 * 8 + draw.randrange(1, 8)
            assert kill_when(process, lambda step=step: lines(run) >= step)
    assert cut_short, "no kill fell into the writing of a checkpoint"
    done = start_ft(*words, "--resume").wait()
    assert done.code == 0, done.err
    check_same(run, setup / "whole", metrics, rounding)


def test_resumed_before_the_first_checkpoint(
    setup: Path, words: list[object], tmp_path: Path, start_ft: Any, ft: Any, metrics: Any, rounding: float
) -> None:
    run = tmp_path / "run"
    more = ["training.save_every=1000", "training.keep_checkpoints=1"]  # how often to save may change
    assert kill_when(start_ft(*words, *more), lambda: lines(run) >= 2)
    assert checkpoints(run) == []
    done = ft(*words, "--resume")
    assert done.code == 0, done.err
    check_same(run, setup / "whole", metrics, rounding)


def test_killed_while_the_model_is_loaded(words: list[object], tmp_path: Path, start_ft: Any, ft: Any) -> None:
    run = tmp_path / "run"
    assert kill_when(start_ft(*words), (run / "checkpoints").is_dir)
    assert not (run / "environment.json").exists()
    done = ft(*words, "training.max_steps=1")
    assert done.code == 0, done.err


def test_interrupted_then_its_newest_checkpoint_is_damaged(
    setup: Path, words: list[object], tmp_path: Path, start_ft: Any, ft: Any, metrics: Any, rounding: float
) -> None:
    run = tmp_path / "run"
    process = start_ft(*words)
    while lines(run) < 8:
        assert process.running
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    stopped = process.wait()
    assert stopped.code == 130
    step = metrics(run)[-1]["step"]
    assert 7 <= step < STEPS
    assert stopped.message == f"stopped at step {step}; go on with: ft {' '.join(map(str, words))} --resume"
    assert "Traceback" not in stopped.err
    newest = run / "checkpoints" / f"checkpoint-{step}"
    assert checkpoints(run)[-1] == newest.name
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()

    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    done = ft(*words, "--resume")
    assert done.code == 0, done.err
    earlier = (step - 1) // SAVE_EVERY * SAVE_EVERY
    assert f"going on from step {earlier} ({run}/checkpoints/checkpoint-{earlier})" in done.err
    check_same(run, setup / "whole", metrics, rounding)


@pytest.fixture
def part(words: list[object], tmp_path: Path, start_ft: Any) -> Path:
    """A run killed after its first checkpoint."""
    run = tmp_path / "run"
    assert kill_when(start_ft(*words), (run / "checkpoints" / f"checkpoint-{SAVE_EVERY}").is_dir)
    return run


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_the_same_updates_with_the_state_elsewhere_go_on(
    setup: Path, words: list[object], part: Path, ft: Any, metrics: Any, rounding: float, optimizer: str
) -> None:
    refused = ft(*words, "--resume", "training.optimizer=adamw_torch")
    assert refused.code == 2
    assert "training.optimizer was 'adamw_8bit' and is 'adamw_torch'" in refused.message
    done = ft(*words, "--resume", f"training.optimizer={optimizer}")
    assert done.code == 0, done.err
    check_same(part, setup / "whole", metrics, rounding)


def test_what_may_not_change_on_resuming(
    setup: Path, words: list[object], part: Path, ft: Any, tree: Any, sums: Any, write_rows: Any, tmp_path: Path
) -> None:
    before = tree(part)
    refused = ft(*words, "--resume", "training.learning_rate=1e-4", "lora.dropout=0.2")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        f"ft train: cannot resume {part} with another configuration: lora.dropout was 0.1 and is 0.2, "
        "training.learning_rate was 0.005 and is 0.0001\n"
    )
    data = setup / "rows.jsonl"
    rows = data.read_text(encoding="utf-8")
    write_rows(data, sums(121))
    try:
        refused = ft(*words, "--resume")
    finally:
        data.write_text(rows, encoding="utf-8")
    assert refused.code == 2
    assert refused.message == f"ft train: cannot resume {part}: the training data has changed since the run began"
    refused = ft(*words, "--resume", "--overwrite")
    assert refused.message == "ft train: --resume and --overwrite exclude each other: give one"
    assert tree(part) == before


def test_a_finished_run(ft: Any, words: list[object], tmp_path: Path, tree: Any, metrics: Any) -> None:
    run = tmp_path / "run"
    short = [*words, "training.max_steps=3"]
    assert ft(*short).code == 0
    before = tree(run)
    refused = ft(*short, "--resume")
    assert (refused.code, refused.err) == (
        2,
        f"ft train: {run} is finished, at step 3: nothing to resume (--overwrite starts anew)\n",
    )
    assert tree(run) == before
    longer = ft(*words, "training.max_steps=5", "--resume")
    assert longer.code == 0, longer.err
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5]
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["max_steps"] == 5


def test_a_finished_run_goes_on_by_epochs(
    ft: Any, words: list[object], tmp_path: Path, tree: Any, metrics: Any
) -> None:
    """How many steps an epoch has is known only once the rows are packed."""
    run = tmp_path / "run"
    words = [*words, "training.gradient_accumulation=24"]
    assert ft(*words, "training.max_steps=4").code == 0

    def check_refused(epochs: float, steps: int) -> None:
        before = tree(run)
        refused = ft(*words, "training.max_steps=null", f"training.epochs={epochs}", "--resume")
        assert refused.code == 2
        assert refused.message.startswith(f"ft train: {run} is finished, at step {steps}: nothing to resume (")
        assert tree(run) == before

    check_refused(0.5, 4)  # of three steps, as packing has it
    check_refused(1, 4)
    longer = ft(*words, "training.max_steps=null", "training.epochs=3", "--resume")
    assert longer.code == 0, longer.err
    assert [row["step"] for row in metrics(run)] == list(range(1, 10))
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["epochs"] == 3
    check_refused(3, 9)


def cut(run: Path, part: Path, step: int) -> None:
    """Copy a finished run as it was after the checkpoint of `step`, as far as resuming looks at it."""
    shutil.copytree(run, part)
    for name in checkpoints(part):
        if int(name.rpartition("-")[2]) > step:
            shutil.rmtree(part / "checkpoints" / name)
    shutil.rmtree(part / "adapter")
    (part / "summary.json").unlink()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_run(
    words: list[object], tmp_path: Path, ft: Any, metrics: Any, rounding: float, quantization: str
) -> None:
    """The adapter's float32 weights come back whole from a checkpoint."""
    run, whole = tmp_path / "run", tmp_path / "finished"
    words = [*words, f"quantization={quantization}", "training.max_steps=6"]
    assert ft(*words, f"output={whole}").code == 0
    cut(whole, run, 3)
    done = ft(*words, "--resume")
    assert done.code == 0, done.err
    mine, theirs = ([row["loss"] for row in metrics(folder)] for folder in (run, whole))
    assert mine == pytest.approx(theirs, rel=rounding, abs=0)
    if not rounding:
        weights = "adapter/adapter_model.safetensors"
        assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def test_held_out_data_that_has_changed(
    words: list[object], tmp_path: Path, ft: Any, sums: Any, write_rows: Any, metrics: Any
) -> None:
    """The rows that were measured before training are measured after it, whatever has become of their file."""
    run, whole = tmp_path / "run", tmp_path / "finished"
    data = write_rows(tmp_path / "held_out.jsonl", sums(6, seed=1))
    words = [*words, "eval_split=null", f"eval_data={data}", "training.max_steps=6", "training.eval_every=2"]
    assert ft(*words, f"output={whole}").code == 0
    cut(whole, run, 3)
    write_rows(data, sums(9, seed=2))
    done = ft(*words, "--resume")
    assert done.code == 0, done.err
    for name in ("held_out.jsonl", "evaluation.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert [(r["step"], r["loss"]) for r in metrics(run, "eval")] == [
        (r["step"], r["loss"]) for r in metrics(whole, "eval")
    ]
    data.unlink()
    assert ft(*words, "--resume", "training.max_steps=8").code == 0


def test_resuming_what_is_not_there_begins_it(ft: Any, words: list[object], tmp_path: Path) -> None:
    assert ft(*words, "training.max_steps=1", "--resume").code == 0
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_run_from_a_newer_version(ft: Any, words: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ft(*words, "training.max_steps=1").code == 0
    path = run / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "run_format": 2}), encoding="utf-8")
    for command in (["eval", run], ["chat", run], [*words, "--resume"]):
        done = ft(*command)
        assert (done.code, done.err) == (
            2,
            f"ft {command[0]}: {run} has run format 2, this ft-core reads 1: upgrade ft-core\n",
        )
