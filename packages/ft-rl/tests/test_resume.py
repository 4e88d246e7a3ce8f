"""A run that is killed while it writes completions or updates goes on to the numbers of one that is not, exactly."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest

from ft_core.training import train
from ft_core.training.trainer import last_whole_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

STEPS, SAVE_EVERY = 8, 3
REWARD = """
KIND = {"please", "gladly", "thanks", "welcome", "sure"}

def kindness(prompts, completions, **columns):
    return [sum(word in KIND for word in text.split()) / max(len(text.split()), 1) for text in completions]
"""
TIMES = {"memory", "step_time"}
"""What two runs of the same training differ in, beside all that is named after seconds."""

# Completions serve four optimizer steps, and a checkpoint is due in the middle of them; a divergence has a reference.
REUSED = {"num_iterations": 2, "steps_per_generation": 4, "beta": 0.05}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"disable_dropout": False}),
    "grpo": ("grpo", {}),
    "grpo-reused": ("grpo", REUSED),
    "gspo-reused": ("gspo", REUSED),
    "ppo": ("ppo", {"num_ppo_epochs": 4, "kl_target": 0.5}),
    "ppo-judge": ("ppo", {"num_ppo_epochs": 2}),  # a reward model on the policy's base
}
# Four optimizer steps are done, a checkpoint is there of three: grpo writes at each step, ppo and those that reuse
# completions at every fourth.
KILLS = [
    ("dpo", "backward"),
    ("dpo", "update"),
    ("grpo", "rollout"),
    ("grpo-reused", "rollout"),
    ("grpo-reused", "update"),
    ("gspo-reused", "backward"),
    ("ppo", "rollout"),
    ("ppo", "backward"),
    ("ppo", "update"),
    ("ppo-judge", "rollout"),
    ("ppo-judge", "backward"),
]


def values(toy: Any, model: Path, judge: Path, folder: Path, case: str) -> dict[str, Any]:
    method, settings = SETTINGS[case]
    given = toy.rows(64, seed=1, twins=True)
    if method != "dpo":
        given = [{"prompt": row["prompt"].strip()} for row in given]
        (folder / "kind.py").write_text(REWARD)
        settings = {"max_completion_length": 8, **settings}
    reward: Any = {"name": "reward-model", "model": str(judge)} if "judge" in case else f"{folder / 'kind.py'}:kindness"
    toy.write_rows(folder / "rows.jsonl", given)
    return {
        "model": str(model),
        "method": method,
        "data": str(folder / "rows.jsonl"),
        "eval_split": 8,
        "max_length": 32,
        "lora": {"r": 4, "dropout": 0.1 if method == "dpo" else 0.0},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "learning_rate": 5e-3,
            "save_every": SAVE_EVERY,
        },
        method: settings,
        **({} if method == "dpo" else {"rewards": [reward]}),
        "output": str(folder / "run"),
    }


@pytest.fixture(scope="module")
def whole(toy: Any, steep_model: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`whole(case)`: the run of a case that nobody kills, made once."""
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = train(values(toy, steep_model, judge, folder, case), say=lambda line: None).run
        return made[case]

    return run


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes forked from one that has imported the libraries, so that each starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ft_core.training.run", "ft_rl.ppo_trainer", "ft_rl.dpo", "peft", "datasets"])
    return context


def kill(processes: Any, given: dict[str, Any], folder: Path, at: str, after: int) -> None:
    """Train in another process until it kills itself there."""
    names = {"VALUES": given, "LOG": str(folder / "log.txt"), "KILL": {"at": at, "after": after}}
    process = processes.Process(
        target=runpy.run_path, args=(str(Path(__file__).with_name("child.py")), names, "__main__")
    )
    process.start()
    try:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (folder / "log.txt").read_text()
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def numbers(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {
            name: value
            for name, value in row.items()
            if name not in TIMES and not name.endswith(("seconds", "per_second"))
        }
        for row in rows
    ]


def check_same(run: Path, expected: Path) -> None:
    assert numbers(run) == numbers(expected)
    assert [row["step"] for row in numbers(run)] == list(range(1, STEPS + 1))
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (expected / weights).read_bytes()
    mine, theirs = (json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in (run, expected))
    assert mine == theirs


@pytest.mark.parametrize(("case", "at"), KILLS)
def test_killed_and_resumed(
    toy: Any, steep_model: Path, judge: Path, whole: Any, processes: Any, tmp_path: Path, case: str, at: str
) -> None:
    given = values(toy, steep_model, judge, tmp_path, case)
    kill(processes, given, tmp_path, at, after=4)
    run = Path(given["output"])
    checkpoint = last_whole_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{SAVE_EVERY}"
    assert len(numbers(run)) == 4  # the fifth step is what was cut short
    said: list[str] = []
    assert train(given, resume=True, say=said.append).status == "finished"
    assert any("scores on the policy's base" in line for line in said) == ("judge" in case)
    assert f"going on from step {SAVE_EVERY} ({checkpoint})" in said
    check_same(run, whole(case))


@pytest.mark.parametrize("case", SETTINGS)
def test_there_is_something_to_compare(whole: Any, case: str) -> None:
    """Else equal numbers would prove little: no two steps are alike, and rewards differ."""
    rows = numbers(whole(case))
    assert len({row["loss"] for row in rows}) == STEPS
    assert len({row["reward"] for row in rows if "reward" in row}) >= (0 if case == "dpo" else 2)
    if case == "ppo":  # the divergence's weight moves
        assert len({row["kl_coef"] for row in rows if "kl_coef" in row}) == 2
