"""The README's examples run: the Python as it stands, the configuration with a tiny model in place of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_core.config import load_config
from ft_core.training import train

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def configurations() -> list[str]:
    """The whole ones; others show a section."""
    return [example for example in blocks("yaml") if "\nmethod:" in example]


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


METHODS = {
    "reward": {"loss", "accuracy", "margin"},
    "dpo": {"likelier", "accuracy", "margin"},
    "orpo": {"accuracy", "log_odds_ratio", "log_likelihood"},
    "kto": {"accuracy", "margin", "reward_wanted", "reward_unwanted", "log_likelihood"},
    "grpo": {"reward", "exact-match", "length"},
    "gspo": {"reward", "length"},
    "ppo": {"reward", "length"},
}
"""What `ft eval` reports of each method's example; where a reward is alone, it is the reward."""


def test_every_method_has_an_example() -> None:
    from ft_core.plugins import MethodSpec
    from ft_rl import plugin

    methods = [yaml.safe_load(example)["method"] for example in configurations()]
    assert methods == list(METHODS)
    specs = (getattr(plugin, name) for name in plugin.__all__)
    assert set(methods) == {spec.name for spec in specs if isinstance(spec, MethodSpec)}


def test_every_setting_of_a_method_is_in_its_table() -> None:
    from ft_core.plugins import MethodSpec, registry, resolve

    sections = re.split(r"^## ", README, flags=re.MULTILINE)
    for name in METHODS:
        (section,) = [text for text in sections if f"\nmethod: {name}\n" in text]
        keys = resolve(registry().get(MethodSpec, name).settings).model_fields
        said = section if name != "gspo" else section + next(text for text in sections if "\nmethod: grpo\n" in text)
        assert [key for key in keys if f"`{key}`" not in said] == []


def test_the_configurations(toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is trained, in the README's order: PPO's reward model is the first one's run."""
    monkeypatch.chdir(tmp_path)
    pairs = toy.rows(40, seed=0)
    toy.write_rows(Path("pairs.jsonl"), pairs)
    answers = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    toy.write_rows(Path("answers.jsonl"), answers)
    questions = [{"prompt": row["prompt"].strip(), "answer": row["chosen"]} for row in toy.rows(60, seed=1)]
    toy.write_rows(Path("questions.jsonl"), questions)
    for example in configurations():
        method = yaml.safe_load(example)["method"]
        Path(f"{method}.yaml").write_text(example)
        changes = [f"model={tiny_model}", "max_length=64", "training.max_steps=2"]
        if METHODS[method] & {"reward"}:
            changes.append(f"{method}.max_completion_length=8")
        config = load_config(f"{method}.yaml", changes)
        result = train(config, say=lambda line: None)
        assert (method, result.status, result.steps) == (method, "finished", 2)
        assert result.evaluation is not None
        assert METHODS[method] <= set(result.evaluation["metrics"])
