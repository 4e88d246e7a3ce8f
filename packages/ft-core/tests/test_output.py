"""The run folder: where `output` lies, who may write in it, and what comes back after a kill."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_core.errors import FtError, RunError
from ft_core.runs import Run
from ft_core.training.lock import held

needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


# -- one training at a time


def test_only_one_holds_a_folder_at_a_time(tmp_path: Path) -> None:
    """Eight count to fifteen each in a file, by reading and writing it: a lock that let two in would lose a number."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count() -> None:
        done = 0
        while done < 15:
            try:
                with held(tmp_path / "run"):
                    number = int(counter.read_text())
                    time.sleep(0.0002)
                    counter.write_text(str(number + 1))
                    done += 1
            except RunError:
                continue

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "120"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_what_a_lock_leaves_behind(tmp_path: Path) -> None:
    run = tmp_path / "a" / "b" / "run"
    with held(run), pytest.raises(RunError) as caught, held(run):
        pass
    assert str(caught.value) == (
        f"another ft train (process {os.getpid()}) is writing {run}: wait for it, or give another output"
    )
    assert list(tmp_path.iterdir()) == []  # not even the folders above
    with held(run):
        run.mkdir()
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot make the run folder .*: Not a directory"), held(tmp_path / "file/run"):
        pass


@needs_signals
@pytest.mark.parametrize("word", [None, "--overwrite", "--resume"])
def test_a_second_training_in_the_same_folder_is_refused(
    configure: Any, tmp_path: Path, start_ft: Any, ft: Any, tree: Any, metrics: Any, word: str | None
) -> None:
    """While the first loads its model (nothing but an empty folder is there) or, for the others, while it trains."""
    run = tmp_path / "run"
    first = start_ft("train", configure(training={"max_steps": 30}))
    begun = (run / "checkpoints") if word is None else (run / "metrics.jsonl")
    while not begun.exists():
        assert first.running, first.log.read_text()
        time.sleep(0.001)  # the process wants the core
    os.kill(first.pid, signal.SIGSTOP)
    before = tree(run)
    second = ft("train", configure(), "training.max_steps=40", *([word] if word else []))
    assert (second.code, second.err) == (
        2,
        f"ft train: another ft train (process {first.pid}) is writing {run}: wait for it, or give another output\n",
    )
    assert tree(run) == before
    os.kill(first.pid, signal.SIGCONT)
    done = first.wait()
    assert done.code == 0, done.err
    assert [row["step"] for row in metrics(run)] == list(range(1, 31))
    assert not (tmp_path / ".run.lock").exists()


@needs_signals
def test_a_killed_training_holds_nobody_up(configure: Any, tmp_path: Path, start_ft: Any, ft: Any) -> None:
    first = start_ft("train", configure())
    while not (tmp_path / "run" / "checkpoints").exists():
        assert first.running, first.log.read_text()
        time.sleep(0.001)  # the process wants the core
    os.kill(first.pid, signal.SIGKILL)
    first.process.join()
    assert (tmp_path / ".run.lock").exists()
    done = ft("train", configure(), "training.max_steps=1")
    assert done.code == 0, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "log-0.txt", "rows.jsonl", "run"]


# -- where it lies


def test_the_folder_that_one_is_in(
    configure: Any, tmp_path: Path, ft: Any, monkeypatch: pytest.MonkeyPatch, tree: Any
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    config = configure(training={"max_steps": 1})
    monkeypatch.chdir(here)
    refused = ft("train", config, "output=.", "lora.targets=[nothing]")
    assert refused.code == 2
    assert list(Path.cwd().iterdir()) == []
    done = ft("train", config, "output=.")
    assert done.code == 0, done.err
    assert Path.cwd() == here
    assert (here / "adapter").is_dir()
    before = tree(here)
    refused = ft("train", config, "output=.", "--overwrite")
    assert refused.err == f"ft train: output {here} is the folder that you are in: overwrite it from another one\n"
    assert tree(here) == before
    assert ft("train", config, "output=.", "training.max_steps=2", "--resume").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "here", "rows.jsonl"]


def test_a_folder_below_home(configure: Any, tmp_path: Path, ft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    done = ft("train", configure(training={"max_steps": 1}), "output=~/runs/mine")
    assert done.code == 0, done.err
    assert (home / "runs" / "mine" / "adapter").is_dir()
    assert not (tmp_path / "~").exists()


def test_paths_are_kept_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Run("runs/mine").path) == str(Path("runs/mine"))
    assert Run(".").path == tmp_path.resolve()
    with pytest.raises(RunError, match="cannot be a run folder"):
        Run(tmp_path.anchor)


def test_a_run_that_never_took_a_step_stands_in_nobodys_way(
    configure: Any, tmp_path: Path, ft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a fault in the first step leaves is overwritten by the corrected configuration."""
    from ft_core.training.replan import ReplanningMixin

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RunError("a reward is wrong")

    with monkeypatch.context() as patch:
        patch.setattr(ReplanningMixin, "training_step", fails)
        failed = ft("train", configure(training={"max_steps": 1}))
    assert (failed.code, failed.message) == (2, "ft train: a reward is wrong")
    assert (tmp_path / "run" / "config.yaml").is_file()
    config = configure(training={"max_steps": 1, "learning_rate": 1e-3})
    assert ft("train", config).code == 0
    assert not list(tmp_path.glob(".run*"))
    assert "already holds a run" in ft("train", config).message


# -- what a killed overwriting left


@needs_signals
def test_a_killed_overwriting_keeps_the_old_run(
    configure: Any, tmp_path: Path, start_ft: Any, ft: Any, tree: Any
) -> None:
    run, old = tmp_path / "run", tmp_path / ".run.old"
    config = configure(training={"max_steps": 1})
    assert ft("train", config).code == 0
    before = tree(run)
    # Whatever the next start is, it puts back what was there before the killed one, and then does what it is told.
    for words, message in (
        ([], f"output {run} already holds a run: go on with --resume, or start anew with --overwrite"),
        (["--resume"], f"{run} is finished, at step 1: nothing to resume (--overwrite starts anew)"),
        (["--overwrite", "lora.targets=[nothing]"], "lora.targets: the model has no module 'nothing' "),
    ):
        killed = start_ft("train", config, "--overwrite")
        while not old.is_dir():
            assert killed.running, killed.log.read_text()
            time.sleep(0.001)
        os.kill(killed.pid, signal.SIGKILL)
        killed.process.join()
        assert tree(old) == before
        refused = ft("train", config, *words)
        assert (refused.code, refused.message[: len(message) + 10]) == (2, f"ft train: {message}")
        assert tree(run) == before
        assert not old.exists()
    assert ft("train", config, "--overwrite", "training.seed=5").code == 0
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]["seed"] == 5


def test_a_folder_of_the_users_is_not_replaced_by_an_old_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    (tmp_path / ".run.old").mkdir()
    run.path.mkdir()
    (run.path / "notes.txt").touch()
    run.recover()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]
    assert (tmp_path / ".run.old").is_dir()


# -- an interruption while something is written


@pytest.mark.parametrize("name", ["adapter", "summary.json", "config.yaml"])
def test_an_interruption_leaves_nothing_half_written(
    configure: Any, tmp_path: Path, ft: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        done = ft("train", configure(training={"max_steps": 1}))
    assert done.code == 130
    assert list(tmp_path.rglob(".*")) == []
    assert not (tmp_path / "run" / name).exists()
    assert (tmp_path / "run").exists() == (name != "config.yaml")
    assert ft("train", configure(training={"max_steps": 1}), "--resume").code == 0


# -- the quickstart's folder


def test_what_the_quickstart_takes_for_its_own(tmp_path: Path) -> None:
    from ft_core.quickstart.__main__ import _check, main

    _check(tmp_path / "nowhere", overwrite=False)
    for name in (".DS_Store", ".run.lock"):
        (tmp_path / name).touch()
    _check(tmp_path, overwrite=False)
    (tmp_path / ".run.old").mkdir()
    with pytest.raises(FtError, match="holds a quickstart already: give --overwrite"):
        _check(tmp_path, overwrite=False)
    for name in ("data", "run"):
        (tmp_path / name).mkdir()
    _check(tmp_path, overwrite=True)
    (tmp_path / "thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(FtError, match=r"holds other files \(thesis.txt, …\)"):
            _check(tmp_path, overwrite=overwrite)
    assert main(["--out", str(tmp_path), "--overwrite"]) == 2
