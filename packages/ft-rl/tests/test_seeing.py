"""What a person sees of a run: the report's plots and its best and worst completions, and samples after a resume."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import FtError
from ft_core.training import train

REWARDS = """
import os, pathlib
KIND = {"please", "gladly", "thanks", "welcome", "sure"}
HERE = pathlib.Path(__file__).parent

def kindness(prompts, completions, **columns):
    broken = HERE / "broken"
    if broken.exists() and len(completions) == 8:  # of training; held-out ones are fewer
        left = int(broken.read_text())
        if left == 0:
            raise OSError("the judge is gone")
        broken.write_text(str(left - 1))
    return [sum(word in KIND for word in text.split()) / max(len(text.split()), 1) for text in completions]

def brevity(prompts, completions, **columns):
    return [-float(len(text.split())) for text in completions]
"""
STEPS = 5


def config(toy: Any, model: Path, folder: Path, method: str, run: str = "run") -> dict[str, Any]:
    prompts = [{"prompt": row["prompt"].strip()} for row in toy.rows(20, seed=1)]
    toy.write_rows(folder / "prompts.jsonl", prompts[:16])
    toy.write_rows(folder / "held_out.jsonl", prompts[16:])
    toy.write_rows(folder / "pairs.jsonl", toy.rows(32, seed=1, twins=True))
    path = folder / "rewards.py"
    path.write_text(REWARDS)
    values = {
        "model": str(model),
        "method": method,
        "max_length": 32,
        "lora": {"r": 4},
        "training": {"max_steps": STEPS, "batch_size": 8, "save_every": 2, "learning_rate": 1e-2},
        "output": str(folder / run),
    }
    values["training"]["gradient_accumulation"] = 1
    if method == "dpo":
        return values | {"data": str(folder / "pairs.jsonl"), "eval_split": 4}
    rewards = [f"{path}:kindness", {"name": f"{path}:brevity", "weight": 0.5}]
    data = {"data": str(folder / "prompts.jsonl"), "eval_data": str(folder / "held_out.jsonl"), "rewards": rewards}
    return values | data | {method: {"max_completion_length": 8}}


def quiet(line: str) -> None:
    """Nothing is said."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def plots(page: str) -> dict[str, dict[str, list[float]]]:
    """The values of each plot on a page, by its id and the labels of its lines."""
    shown = {}
    for figure in re.findall(r"<figure .*?</figure>", page, re.DOTALL):
        data = re.search(r'<script type="application/json">(.*?)</script>', figure)
        if data:  # bars have none
            name = re.match(r'<figure id="([^"]+)"', figure)[1]
            shown[name] = {series["label"]: series["y"] for series in json.loads(data[1])["series"]}
    return shown


@pytest.fixture(scope="module")
def whole(toy: Any, steep_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of GRPO with two rewards."""
    return train(config(toy, steep_model, tmp_path_factory.mktemp("grpo"), "grpo"), say=quiet).run


def test_the_numbers_of_a_rollout_are_recorded(whole: Path) -> None:
    rows = [row for row in lines(whole / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == STEPS
    for row in rows:
        assert row["completions/count"] == 8
        assert 0 < row["completions/seconds"] < row["seconds"]
        assert row["completions/per_second"] == pytest.approx(8 / row["completions/seconds"])
        assert row["rewards/kindness/share"] == pytest.approx(row["rewards/kindness/mean"])
        assert row["rewards/brevity/share"] == pytest.approx(row["rewards/brevity/mean"] / 2)
        both = row["rewards/kindness/share"] + row["rewards/brevity/share"]
        assert row["reward"] == pytest.approx(both, abs=1e-5)


def test_the_samples_are_those_of_each_step(whole: Path) -> None:
    rows = lines(whole / "samples.jsonl")
    assert [(row["step"], row["rank"]) for row in rows] == [
        (step, rank) for step in range(1, STEPS + 1) for rank in ("best", "worst")
    ]
    metrics = {row["step"]: row for row in lines(whole / "metrics.jsonl") if row["kind"] == "train"}
    prompts = {row["prompt"] for row in lines(whole.parent / "prompts.jsonl")}
    kind = {"please", "gladly", "thanks", "welcome", "sure"}
    for row in rows:
        words = row["completion"].split()
        rewards = {"kindness": sum(w in kind for w in words) / max(len(words), 1), "brevity": -len(words)}
        assert row["rewards"] == pytest.approx(rewards)
        assert row["reward"] == pytest.approx(rewards["kindness"] + rewards["brevity"] / 2)
        assert row["prompt"] in prompts
        mean = metrics[row["step"]]["reward"]
        assert row["reward"] >= mean - 1e-6 if row["rank"] == "best" else row["reward"] <= mean + 1e-6


def test_the_report_of_a_rollout_method(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    shown = plots(page)
    there = "reward each-reward ties step-time entropy clipped length cut gap written rollouts"
    assert {f"known-{name}" for name in there.split()} <= set(shown)
    assert not [name for name in shown if "margin" in name]
    metrics = [row for row in lines(whole / "metrics.jsonl") if row["kind"] == "train"]
    assert set(shown["known-reward"]) == {"total", "kindness", "brevity"}
    for label, key in (("total", "reward"), ("kindness", "rewards/kindness/share")):
        assert shown["known-reward"][label] == pytest.approx([row[key] for row in metrics], rel=1e-4)
    section = page.split('<section id="completions"')[1].split("</section>")[0]
    samples = {(row["step"], row["rank"]): row for row in lines(whole / "samples.jsonl")}
    told = re.findall(r"(best|worst) of step (\d+)", section)
    assert told == [(rank, str(step)) for step in (1, 3, 4, 5) for rank in ("best", "worst")]
    for rank, step in told:
        assert escape(samples[int(step), rank]["completion"]) in section
    assert "further step are in samples.jsonl" in section
    assert "samples.jsonl" in page.split('<section id="files"')[1]


@pytest.mark.parametrize(
    ("method", "there"),
    [
        ("dpo", {"margin", "accuracy", "answers", "likelihood", "entropy"}),
        ("ppo", {"reward", "kl", "policy-kl", "clipped", "length", "gap", "rollouts"}),
    ],
)
def test_the_reports_of_other_methods(
    toy: Any, steep_model: Path, tmp_path: Path, method: str, there: set[str]
) -> None:
    run = train(config(toy, steep_model, tmp_path, method), say=quiet).run
    page = (run / "report.html").read_text()
    assert {f"known-{name}" for name in there} <= set(plots(page))
    assert (run / "samples.jsonl").exists() == (method == "ppo")
    assert ('<section id="completions"' in page) == (method == "ppo")
    assert "known-ties" not in plots(page)  # there are no groups
    if method == "ppo":  # completions of step 1 serve four steps
        assert [row["step"] for row in lines(run / "samples.jsonl")] == [1, 1, 5, 5]


def test_a_resumed_run_has_each_sample_once(toy: Any, steep_model: Path, whole: Path, tmp_path: Path) -> None:
    values = config(toy, steep_model, tmp_path, "grpo")
    broken = tmp_path / "broken"
    broken.write_text("3")  # the fourth step's rollout fails, a step after the checkpoint of the second
    with pytest.raises(FtError, match="the judge is gone"):
        train(values, say=quiet)
    path = tmp_path / "run" / "samples.jsonl"
    assert [row["step"] for row in lines(path)] == [1, 1, 2, 2, 3, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "rank": "be')  # as a kill leaves it
    broken.unlink()
    train(values, resume=True, say=quiet)
    assert path.read_text() == (whole / "samples.jsonl").read_text()
