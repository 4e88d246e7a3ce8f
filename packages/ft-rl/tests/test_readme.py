"""The README's examples run: the Python as it stands, the configuration with a tiny model in place of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ft_core.config import load_config
from ft_core.training import train

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python(capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks("python")
    assert len(examples) == 4
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})  # noqa: S102
        said = re.findall(r"print\(.*\)  # (.*)", example)
        assert capsys.readouterr().out.splitlines() == said


def test_every_reward_and_its_settings_are_in_the_table() -> None:
    from ft_core.plugins import EXTRAS, RewardSpec, registry, resolve

    rows = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", README, re.MULTILINE))
    for name in EXTRAS["ft.rewards"]:
        model = resolve(str(registry().get(RewardSpec, name).settings))
        keys = {field.alias or key for key, field in model.model_fields.items()} - {"tag", "marker"}
        row = rows[name]
        if "the same columns and parts" in row:
            keys -= {"column", "column_part", "part"}
        assert [key for key in sorted(keys) if f"`{key}`" not in row] == []


def test_the_configuration(toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("yaml")
    Path("reward.yaml").write_text(example)
    toy.write_rows(Path("pairs.jsonl"), toy.rows(40, seed=0))
    config = load_config("reward.yaml", [f"model={tiny_model}", "max_length=64", "training.max_steps=2"])
    result = train(config, say=lambda line: None)
    assert (result.status, result.steps) == ("finished", 2)
    assert result.evaluation is not None
    assert set(result.evaluation["metrics"]) == {"loss", "accuracy", "margin"}
