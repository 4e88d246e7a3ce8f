"""Plots and completions of runs by preference and by reinforcement, from metrics as those methods record them."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from ft_core.report import write_report
from ft_core.runs import Run

MakeRun = Callable[..., Path]


def rollout_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    dice = random.Random(0)
    rows = []
    for step in range(1, count + 1):
        right, short = dice.random(), -dice.random()
        rows.append(
            {
                "kind": "train",
                "step": step,
                "loss": 0.0,
                "reward": right + 0.5 * short,
                "rewards/right/mean": right,
                "rewards/right/share": right,
                "rewards/short/mean": short,
                "rewards/short/share": 0.5 * short,
                "kl": 0.01 * step,
                "entropy": 1.0,
                "clip_ratio/region_mean": 0.1,
                "completions/mean_length": 20.0,
                "completions/clipped_ratio": 0.25,
                "completions/count": 16.0,
                "completions/per_second": 3.5,
                "sampling/gap": 1e-3,
                **more,
            }
        )
    return rows


def plots(page: str) -> dict[str, tuple[str, dict[str, dict[str, Any]]]]:
    """Each plot's heading and lines, by its id without ``known-``."""
    shown = {}
    for figure in re.findall(r"<figure .*?</figure>", page, re.DOTALL):
        data = re.search(r'<script type="application/json">(.*?)</script>', figure)
        if data:  # bars have none
            name, head = re.match(r'<figure id="([^"]+)"[^>]*><figcaption>(.*?)(?:<ul|</figcaption>)', figure).groups()
            lines = {series["label"]: series for series in json.loads(data[1])["series"]}
            shown[name.removeprefix("known-")] = (re.sub(r"<[^>]*>", "", head), lines)
    return shown


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def completions_of(page: str) -> str:
    return page.split('<section id="completions"')[1].split("</section>")[0] if 'id="completions"' in page else ""


def sample(step: int, rank: str, **more: Any) -> dict[str, Any]:
    reward = 1.5 if rank == "best" else -0.5
    row = {"step": step, "rank": rank, "reward": reward, "rewards": {"right": reward, "short": 0.0}}
    return row | {"prompt": f"prompt {step}", "completion": f"the {rank} {step}", **more}


def write_samples(run: Path, rows: list[dict[str, Any]], rest: str = "") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "samples.jsonl").write_text(text + rest, encoding="utf-8")
    return run


def test_a_rollout_method_has_its_plots(make_run: MakeRun) -> None:
    rows = rollout_rows(10)
    rows.append({"kind": "eval", "step": 10, "loss": 0.0, "reward": 0.75, "clip_ratio/region_mean": 0.0})
    shown = plots(page_of(make_run(metrics=rows)))
    heads = {name: head for name, (head, _) in shown.items()}
    assert list(heads) == [
        "loss", "reward", "each-reward", "kl", "entropy", "clipped", "length", "cut", "gap", "written", "rollouts",
    ]  # fmt: skip
    assert heads["reward"] == "Reward mean of a step's completions".replace("'", "&#x27;")
    assert heads["gap"] == "Sampler gap nats a token, between sampler and trainer"
    reward = shown["reward"][1]
    assert list(reward) == ["total", "right", "short", "total, held-out data"]
    assert [reward[name]["style"] for name in reward] == ["line", "second", "third", "points"]
    for label, key in (("total", "reward"), ("right", "rewards/right/share"), ("short", "rewards/short/share")):
        assert reward[label]["x"] == list(range(1, 11))
        assert reward[label]["y"] == pytest.approx([row[key] for row in rows[:10]], rel=1e-4)
    assert reward["total, held-out data"]["y"] == [0.75]
    assert list(shown["each-reward"][1]) == ["right", "short"]
    assert list(shown["clipped"][1]) == ["training"]  # of held-out rows nothing is clipped


def test_a_preference_method_has_its_plots(make_run: MakeRun) -> None:
    names = ("rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "logps/chosen")
    rows = [{"kind": "train", "step": i, "loss": 0.5} | dict.fromkeys(names, i / 10) for i in range(1, 9)]
    shown = plots(page_of(make_run(metrics=rows)))
    assert list(shown) == ["loss", "margin", "accuracy", "answers", "likelihood"]
    assert list(shown["answers"][1]) == ["chosen", "rejected"]
    assert shown["margin"][1]["training"]["y"] == [i / 10 for i in range(1, 9)]


def test_one_reward_alone_is_drawn_once(make_run: MakeRun) -> None:
    rows = [{"kind": "train", "step": i, "loss": 0.0, "reward": i, "rewards/right/mean": i} for i in range(1, 4)]
    assert list(plots(page_of(make_run(metrics=rows)))) == ["loss", "reward"]
    for row in rows:
        row["reward"] *= 2  # a weight of 2: the reward's own mean says something else
    assert list(plots(page_of(make_run(metrics=rows, name="weighted")))) == ["loss", "reward", "each-reward"]


def test_a_long_run_is_smoothed_and_its_steps_stay(make_run: MakeRun) -> None:
    head, shown = plots(page_of(make_run(metrics=rollout_rows(60))))["reward"]
    assert list(shown) == ["total, each step", "total", "right", "short"]
    assert re.fullmatch(r"Reward mean of a step&#x27;s completions, smoothed over \d+ steps", head)
    raw, smoothed = (shown[label]["y"] for label in list(shown)[:2])
    assert max(raw) - min(raw) > max(smoothed) - min(smoothed)


def test_more_rewards_than_a_plot_holds_lose_none(make_run: MakeRun) -> None:
    more = {f"rewards/r{i}/share": 0.1 * i for i in range(7)}
    shown = plots(page_of(make_run(metrics=[{"kind": "train", "step": 1, "loss": 0.0, "reward": 2.1} | more])))
    drawn = [label for _, lines in shown.values() for label in lines]
    assert list(shown["reward"][1]) == ["total", "r0", "r1", "r2", "r3"]
    assert {"Rewards r4 share", "Rewards r5 share", "Rewards r6 share"} <= {head for head, _ in shown.values()}
    assert len(drawn) == 1 + 5 + 3


def test_numbers_that_are_none_are_gaps(make_run: MakeRun) -> None:
    rows = rollout_rows(5)
    rows[2]["kl"], rows[3]["kl"] = None, math.inf
    assert plots(page_of(make_run(metrics=rows)))["kl"][1]["training"]["x"] == [1, 2, 5]


def test_the_first_and_the_last_completions(make_run: MakeRun) -> None:
    rows = [sample(step, rank) for step in range(1, 9) for rank in ("best", "worst")]
    section = completions_of(page_of(write_samples(make_run(), rows)))
    assert re.findall(r"the (best|worst) (\d)", section) == [
        (rank, step) for step in "1678" for rank in ("best", "worst")
    ]
    assert "The first that are recorded, of step 1<" in section
    assert "The last, of steps 6, 7 and 8<" in section
    assert "Those of 4 further steps are in samples.jsonl" in section
    assert "<b>1.5</b><small>right 1.5</small><small>short 0</small>" in section
    assert "<b>\N{MINUS SIGN}0.5</b>" in section


def test_a_run_of_one_step_has_one_table(make_run: MakeRun) -> None:
    section = completions_of(page_of(write_samples(make_run(), [sample(1, "best", rewards={"right": 1.5})])))
    assert section.count("<table") == 1
    assert "<small>" not in section  # the reward is all there is
    assert "further" not in section


def test_without_samples_there_is_no_section(make_run: MakeRun) -> None:
    assert not completions_of(page_of(make_run()))
    assert not completions_of(page_of(write_samples(make_run(name="empty"), [])))


def test_lines_that_are_none_do_no_harm(make_run: MakeRun) -> None:
    odd = [
        {"step": 2, "rank": ["best"]},
        {"step": "x", "rank": "best"},
        {"step": 3, "rank": "middling"},
        {"rank": "best"},
    ]
    bare = {"step": 9, "rank": "worst", "rewards": [1], "reward": "high", "prompt": None, "completion": {"a": 1}}
    run = write_samples(make_run(), [sample(1, "best"), *odd, bare], '[1]\n7\n{"step": 10, "ra')
    section = completions_of(page_of(run))
    assert re.findall(r"(best|worst) of step (\d+)", section) == [("best", "1"), ("worst", "9")]
    assert section.count('class="said none"') == 2


def test_what_a_model_writes_stays_text(make_run: MakeRun) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>\ud800"
    section = completions_of(
        page_of(
            write_samples(make_run(), [sample(1, "best", prompt=bad, completion=bad, rewards={bad: 1.0, "b": 0.5})])
        )
    )
    assert "<script" not in section
    assert "<img" not in section
    assert unescape(section).count("<script>alert(1)</script>") == 3


def test_resuming_drops_the_samples_of_later_steps(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows = [sample(step, rank) for step in (1, 2, 3, 4) for rank in ("best", "worst")]
    write_samples(tmp_path, rows, '{"step": 5, "rank": "b')
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"kind": "train", "step": {i}}}\n' for i in (1, 2, 3, 4)))
    run.truncate(2)
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == rows[:4]
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_run_without_samples_gets_no_file_of_them(tmp_path: Path) -> None:
    Run(tmp_path).truncate(0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
