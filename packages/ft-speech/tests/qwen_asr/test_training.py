"""`ft train` on a Qwen3-ASR, from a configuration to a whole run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_try(configure: Any, ft: Any, tmp_path: Path) -> None:
    made = ft("train", configure(eval_split=4, training={"max_steps": 8, "learning_rate": 2.0e-2}))
    print(made.out, made.err)
    assert made.code == 0, made.err
    print(losses(tmp_path / "run"))
    print((tmp_path / "run" / "evaluation.json").read_text())
    print((tmp_path / "run" / "config.yaml").read_text())
    assert 0
