"""Models that have seen nothing learn to read, by `ft train` and no other way: handwriting, and numbers in print.

Nothing that is asked for at the end was in an image of the training. The tests marked slow are the whole of it; the
others are small enough for every run, and hold the same to a lower bar.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from reading import MODELS, handwritten, rendered


def luck(right: float, rows: int, chance: float) -> float:
    """The probability that so large a share of the rows is right by guessing: the binomial distribution's tail."""
    least = round(right * rows)
    return math.fsum(
        math.comb(rows, count) * chance**count * (1 - chance) ** (rows - count) for count in range(least, rows + 1)
    )


def learn(folder: Path, ft: Any, training: dict[str, Any], max_length: int = 512) -> dict[str, Any]:
    """Train a fresh model on the folder's rows from a configuration, and give what `ft eval` finds."""
    config = {
        "model": str(folder / "model"),
        "task": "vision",
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "max_length": max_length,
        "lora": None,
        "vision": {"tower": "full", "projector": "full"},
        "training": {
            "batch_size": 1,
            "gradient_accumulation": 1,
            "optimizer": "adamw_torch",
            "learning_rate": 2.0e-3,
            "warmup_ratio": 0.1,
            "save_every": 100_000,
            **training,
        },
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    made = ft("train", folder / "config.yaml")
    assert made.code == 0, made.err
    found = ft("eval", folder / "run", "--json")
    assert found.code == 0, found.err
    return json.loads(found.out[found.out.index("{") :])  # type: ignore[no-any-return]


def fresh(folder: Path, name: str, **sizes: Any) -> None:
    torch.manual_seed(0)
    (folder / "model").mkdir()
    MODELS[name](folder / "model", **sizes)


@pytest.mark.parametrize("name", MODELS)
def test_handwriting_is_learnt(name: str, ft: Any, tmp_path: Path) -> None:
    """Zeros, ones and twos: what a model that doesn't look gets right of them is a third."""
    fresh(tmp_path, name)
    handwritten(tmp_path, digits=range(3), held_out=45)
    found = learn(tmp_path, ft, {"max_steps": 40})
    right = found["metrics"]["exact_match"]
    assert found["answers"] == 45
    assert luck(1 / 3, 45, 1 / 3) > 0.5  # the bar can be failed
    assert luck(right["after"], 45, 1 / 3) < 1e-6
    assert right["before"] < right["after"]
    assert found["metrics"]["cer"]["after"] < found["metrics"]["cer"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_handwriting_is_read(name: str, ft: Any, tmp_path: Path) -> None:
    fresh(tmp_path, name)
    handwritten(tmp_path)
    found = learn(tmp_path, ft, {"epochs": 6})
    assert found["answers"] == 297
    assert found["metrics"]["exact_match"]["before"] < 0.2
    assert found["metrics"]["exact_match"]["after"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "max_length"), [("qwen3_vl", (64, 32), 512), ("gemma3", (48, 48), 1024)])
def test_numbers_in_print_are_read(name: str, size: tuple[int, int], max_length: int, ft: Any, tmp_path: Path) -> None:
    """Of a thousand numbers a hundred are kept. Gemma 3 sees squares, so that it is shown some."""
    fresh(tmp_path, name, side=48, tokens=36)
    rendered(tmp_path, size=size, copies=4)
    said = [
        {json.loads(line)["messages"][1]["content"] for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()}
        for part in ("train", "held_out")
    ]
    assert [len(numbers) for numbers in said] == [900, 100]
    assert not said[0] & said[1]
    found = learn(tmp_path, ft, {"epochs": 10}, max_length)
    assert found["answers"] == 100
    metrics = {metric: values["after"] for metric, values in found["metrics"].items()}
    assert metrics["exact_match"] > 0.9
    assert metrics["cer"] < 0.1
    assert metrics["anls"] > 0.9
    assert found["metrics"]["exact_match"]["before"] < 0.05
