"""Learning rates of the tower and the projector, from a configuration to the optimizer and the metrics."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_core.config.load import check_config
from ft_vision.families.parts import FAMILIES
from ft_vision.rates import rates


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_a_part_learns_at_its_rate(
    name: str, how: str, configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path, family: Any
) -> None:
    """A first step of AdamW moves every trained weight by the rate, whatever its gradient."""
    vision = {"tower": how, "projector": "full", "tower_learning_rate": 1.0e-3, "projector_learning_rate": 2.0e-4}
    training = {"max_steps": 1, "learning_rate": 5.0e-3, "scheduler": "constant", "warmup_ratio": 0.0, "save_every": 1}
    made = ft("train", configure(name, vision=vision, training=training))
    assert made.code == 0, made.err
    run = tmp_path / "run"
    (row,) = metrics(run)
    rates = [row["learning_rate"], row["tower_learning_rate"], row["projector_learning_rate"]]
    assert rates == pytest.approx([5.0e-3, 1.0e-3, 2.0e-4], rel=1e-12)
    state = torch.load(run / "checkpoints" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    sizes: dict[float, int] = {}
    for group in state["param_groups"]:
        sizes[group["lr"]] = sizes.get(group["lr"], 0) + len(group["params"])
    assert set(sizes) == {5.0e-3, 1.0e-3, 2.0e-4}

    from safetensors.torch import load_file

    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    parts = FAMILIES[name]
    of = {
        1.0e-3: [key for key in trained if any(f"model.{part}." in key for part in parts.tower)],
        2.0e-4: [key for key in trained if any(f"model.{part}." in key for part in parts.projector)],
    }
    of[5.0e-3] = [key for key in trained if key not in of[1.0e-3] + of[2.0e-4]]
    for rate, keys in of.items():
        assert len(keys) == sizes[rate]
        moved = [trained[key].abs().max().item() for key in keys if "lora_B" in key]  # which begin as zeros
        assert all(distance == pytest.approx(rate, rel=1e-3) for distance in moved if distance)
        assert any(moved) or rate != 5.0e-3


def test_a_resumed_run_has_its_rates(configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path) -> None:
    vision = {"tower": "lora", "projector": "full", "tower_learning_rate": 1.0e-3, "projector_learning_rate": 2.0e-4}
    training = {"max_steps": 4, "save_every": 2, "optimizer": "adamw_8bit"}
    assert ft("train", configure(vision=vision, training=training, output=str(tmp_path / "whole"))).code == 0
    path = configure(vision=vision, training=training)
    assert ft("train", path).code == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    assert ft("train", path, "--resume").code == 0
    keys = ("loss", "learning_rate", "tower_learning_rate", "projector_learning_rate")
    found, whole = ([[row[key] for key in keys] for row in metrics(each)] for each in (run, tmp_path / "whole"))
    assert found == whole
    assert found[1][2] == pytest.approx(0.2 * found[1][1], rel=1e-12)
    made = ft("train", configure(vision={**vision, "tower_learning_rate": 2.0e-3}, training=training), "--resume")
    assert made.code == 2
    assert "tower_learning_rate" in made.message


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_each_parameter_of_a_part_has_the_parts_rate(name: str) -> None:
    """Those of a module of the part, and those that belong to it and to no module, under every name that they get."""
    vision = {"tower": "full", "projector": "full", "tower_learning_rate": 1.0e-3, "projector_learning_rate": 2.0e-4}
    config = check_config({"model": "m", "task": "vision", "data": "none", "vision": vision})
    found = rates(SimpleNamespace(config=SimpleNamespace(model_type=name)), config)
    family = FAMILIES[name]
    for part, parameters in {
        "tower": [f"{module}.layers.0.weight" for module in family.tower],
        "projector": [*(f"{module}.bias" for module in family.projector), *family.loose],
        "": ["language_model.layers.0.mlp.weight", "language_model.model.visual_head.weight"],
    }.items():
        for parameter in parameters:
            for above in ("model.", "base_model.model.model.", "module.model."):
                matching = [key for key, (pattern, _) in found.items() if re.fullmatch(pattern, above + parameter)]
                assert matching == ([part] if part else []), above + parameter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"tower_learning_rate": 1e-5}}, "vision.tower_learning_rate: 1e-05 is for a part that is frozen"),
        ({"vision": {"projector_learning_rate": 1e-5}}, "set vision.projector to lora or full, or remove the key"),
        ({"vision": {"tower": "lora", "tower_learning_rate": 0}}, "vision.tower_learning_rate: 0 is not allowed"),
        ({"vision": {"tower": "lora", "tower_learning_rate": "fast"}}, "'fast' is not allowed (allowed: a number)"),
        (
            {"vision": {"tower": "lora", "tower_learning_rate": 1e-5}, "lora": {"targets": ["q_proj"]}},
            "vision.tower_learning_rate: 1e-05 is for parameters of which none is trained",
        ),
    ],
)
def test_a_rate_that_cannot_be_is_refused_in_one_line(
    changes: dict[str, Any], message: str, configure: Callable[..., Path], ft: Callable[..., Any]
) -> None:
    made = ft("train", configure(**changes))
    assert made.code == 2
    assert message in made.message
