"""What a command is pointed at: a run, a model's folder, or a name on the Hub; and which of them a missing one is."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest


def _empty_runs(folder: Path, *names: str) -> None:
    """Folders that count as runs, each newer than the one before."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").touch()
        (folder / name / "environment.json").touch()
        os.utime(folder / name, (number, number))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The hosts that were asked for, none of which answers; and an empty folder to be in."""
    hosts: list[str] = []

    def unreachable(host: Any, *args: Any, **kwargs: Any) -> Any:
        hosts.append(str(host))
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.chdir(tmp_path)
    return hosts


def _words(command: str, reference: str) -> list[str]:
    if command != "generate":
        return [command, reference]
    Path("prompts.txt").write_text("a prompt\n", encoding="utf-8")
    return [command, reference, "--prompts", "prompts.txt", "--out", "answers.jsonl"]


@pytest.mark.parametrize("command", ["chat", "generate", "eval", "report"])
def test_a_run_that_is_not_there(ft: Any, asked: list[str], command: str) -> None:
    what = "run folder" if command in ("eval", "report") else "run or model folder"
    done = ft(*_words(command, "runs/nope"))
    assert (done.code, done.out) == (2, "")
    assert done.err == f"ft {command}: no {what} runs/nope: there is no folder runs\n"
    _empty_runs(Path("runs"), "dates", "sums-1")
    (Path("runs") / "notes").mkdir()
    done = ft(*_words(command, "runs/nope"))
    assert (done.code, done.err) == (2, f"ft {command}: no {what} runs/nope: the runs in runs are sums-1, dates\n")
    near = ft(*_words(command, "runs/sum-1"))
    assert near.err == (
        f"ft {command}: no {what} runs/sum-1: the runs in runs are sums-1, dates; did you mean runs/sums-1?\n"
    )
    inside = ft(*_words(command, "runs/dates/adaptor"))
    assert inside.err == f"ft {command}: no {what} runs/dates/adaptor: the run is runs/dates\n"
    assert asked == []
    assert not Path("answers.jsonl").exists()


@pytest.mark.parametrize("reference", ["./nope", "~/nope-is-no-folder", "a/b/c", "out/nope", "/nowhere/at-all"])
def test_a_path_is_not_asked_of_the_hub(ft: Any, asked: list[str], reference: str) -> None:
    _empty_runs(Path("out"), *(f"run-{number}" for number in range(7)))
    done = ft("chat", reference)
    assert done.code == 2
    assert done.err.startswith("ft chat: no run or model folder ")
    if reference == "out/nope":
        assert done.err.endswith("the runs in out are run-6, run-5, run-4, run-3, run-2 and 2 more\n")
    assert asked == []


@pytest.mark.parametrize("reference", ["nobody/nothing-at-all", "models/nothing-at-all"])
def test_a_name_on_the_hub_is_still_one(
    ft: Any, asked: list[str], reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a folder of the same beginning too, as long as that holds no runs."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (Path("models") / "something").mkdir(parents=True)
    done = ft("chat", reference)
    assert done.code == 2
    assert "and the Hub cannot be reached" in done.message
    assert asked
