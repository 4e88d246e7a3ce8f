"""A run on images that is killed goes on to the numbers of one that is not, exactly."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import seen
import yaml

from ft_core.training import train
from ft_core.training.trainer import last_whole_checkpoint

family = seen.family
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

CHILD = Path(__file__).parents[1] / "packages/ft-rl/tests/child.py"
TIMES = ("memory", "step_time", "seconds", "per_second")
EVEN = """
def even(completions, images, **columns):
    return [float(sum(map(ord, said[0]["content"])) % 2 == 0) for said in completions]
"""


def values(folder: Path, model: Path, method: str, output: str) -> dict[str, Any]:
    """Of grpo, completions serve four steps, and a checkpoint is due in the middle of them."""
    (folder / "even.py").write_text(EVEN)
    settings: dict[str, Any] = {}
    if method == "grpo":
        settings = {
            "rewards": [f"{folder / 'even.py'}:even"],
            "grpo": {"max_completion_length": 6, "num_iterations": 2, "steps_per_generation": 2, "beta": 0.05},
        }
    path = seen.write(
        folder,
        model,
        seen.pairs(folder, 8) if method == "dpo" else seen.prompts(folder, 8, size=(84, 56)),
        method=method,
        eval_split=2,
        output=str(folder / output),
        training={"max_steps": 6, "batch_size": 4, "save_every": 3},
        **settings,
    )
    made: dict[str, Any] = yaml.safe_load(path.read_text())
    return made


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in seen.metrics(run)]


@pytest.mark.parametrize(("method", "at"), [("dpo", "backward"), ("grpo", "rollout")])
def test_killed_and_resumed(method: str, at: str, family: Any, tmp_path: Path) -> None:
    model = family("qwen3_vl")
    whole = train(values(tmp_path, model, method, "whole"), say=lambda line: None).run
    given = values(tmp_path, model, method, "run")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ft_core.training.run", "ft_rl.grpo_trainer", "ft_rl.dpo", "peft", "datasets"])
    names = {"VALUES": given, "LOG": str(tmp_path / "log.txt"), "KILL": {"at": at, "after": 4}}
    process = context.Process(target=runpy.run_path, args=(str(CHILD), names, "__main__"))
    process.start()
    try:
        process.join(240)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    run = tmp_path / "run"
    checkpoint = last_whole_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    assert train(given, resume=True, say=lambda line: None).status == "finished"
    assert numbers(run) == numbers(whole)
    assert len({row["loss"] for row in numbers(run)}) == 6
    for name in ("adapter/adapter_model.safetensors", "evaluation.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    if method == "grpo":
        assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    shutil.rmtree(run)
