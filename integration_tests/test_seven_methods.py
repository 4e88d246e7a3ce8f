"""Every method of ft-rl from a configuration, through the command line, with a real model on a processor.

Two steps each, which is enough to see that all parts hold together; that the methods learn is shown by the minutes-long
`packages/ft-rl/tests/test_smollm2.py`. All seven together take a minute and a half of one thread's work.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "packages/ft-rl/tests"))  # for real_model.py, which is no test
from real_model import PREFERENCE, WRITING, Run, configuration, write_pairs, write_sums

from ft_core.cli import main

HELD_OUT = 4


def config_of(method: str, folder: Path) -> dict[str, Any]:
    steps: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "warmup_ratio": 0.0, "scheduler": "constant"}
    output = folder / f"run-{method}"
    if method in PREFERENCE:
        # The same pairs in every step, so that a step of steepest descent can but lower the loss.
        data = write_pairs(folder, rows=2 if method == "kto" else 4, held_out=HELD_OUT)
        return configuration(method, data, output, training=steps | {"learning_rate": 3e-4})
    own: dict[str, Any] = {"max_completion_length": 6}
    if method != "ppo":
        own["num_generations"] = 4  # of one prompt a step
    return configuration(
        method,
        write_sums(folder, rows=8, held_out=HELD_OUT),
        output,
        training=steps | {"learning_rate": 1e-4},
        # Four completions of six tokens are as good as never of one length, so that they differ in what they earn.
        rewards=[{"name": "length", "target": 12, "unit": "characters"}],
        **{method: own},
    )


def numbers(value: Any) -> list[float]:
    """All that are somewhere in ``value``."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.parametrize("method", [*PREFERENCE, *WRITING])
def test_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    from safetensors import safe_open

    values = config_of(method, tmp_path)
    file = tmp_path / f"{method}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", str(file)]) == 0, capsys.readouterr().err

    folder = Path(values["output"])
    wanted = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "evaluation.json", "held_out.jsonl"}
    wanted |= {"report.html", "adapter"} | ({"samples.jsonl"} if method in WRITING else set())
    assert not wanted - {path.name for path in folder.iterdir()}
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp"))]

    run = Run.read(folder)
    assert [row["step"] for row in run.steps] == list(range(1, values["training"]["max_steps"] + 1))
    assert all(math.isfinite(number) for row in run.steps for number in numbers(row))
    assert all(row["tokens"] > 0 for row in run.steps if method != "ppo" or "reward" in row)
    measured = [*run.before.values(), *run.after.values()]
    assert measured
    assert all(math.isfinite(number) for number in measured)
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"] == (
        2 * HELD_OUT if method == "kto" else HELD_OUT  # of a pair two answers
    )

    # An adapter begins as nothing: its second factors are zero until they are trained.
    with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as adapter:
        factors = [name for name in adapter.keys() if "lora_B" in name]  # noqa: SIM118 - this is no dict
        assert len(factors) == 7 * 30  # each linear of each layer
        assert all(adapter.get_tensor(name).any() for name in factors)

    if method in PREFERENCE:
        losses = [row["loss"] for row in run.steps]
        assert all(later < earlier for earlier, later in itertools.pairwise(losses)), losses
    else:
        assert all(0 < row["completions/mean_length"] <= 6 for row in run.steps if "reward" in row)
