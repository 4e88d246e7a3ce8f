"""The key `rewards`: what a configuration may say of rewards, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_core.config import RewardEntry, TrainConfig, to_yaml
from ft_core.config.load import check_config, reward_settings
from ft_core.errors import ConfigError, FtError
from ft_core.plugins import registry
from ft_core.training import train

MODULE = "toy_rewards_of_ft_core"
CODE = """
from ft_core.plugins import MethodSpec, RewardSpec
from pydantic import BaseModel, ConfigDict, Field

class Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid")

class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    deep: int = 1

class Own(BaseModel):
    model_config = ConfigDict(extra="forbid")
    target: int = Field(default=3, ge=1)
    shape: dict | None = Field(default=None, alias="schema")
    inner: Inner = Inner()

METHOD = MethodSpec(
    name="toy-rl", summary="", settings=f"{__name__}:Nothing", trainer="a:b", formats=(), evaluate="a:b", rewards=True
)
PLAIN = RewardSpec(name="toy-plain", summary="", reward="a:b")
OWN = RewardSpec(name="toy-own", summary="", reward="a:b", settings=f"{__name__}:Own")
"""
POINTS = f"[ft.methods]\ntoy-rl = {MODULE}:METHOD\n\n[ft.rewards]\ntoy-plain = {MODULE}:PLAIN\ntoy-own = {MODULE}:OWN\n"
VALUES = {"model": "some/model", "data": "rows.jsonl", "method": "toy-rl"}


@pytest.fixture(autouse=True)
def _plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A third party's method and rewards, as pip leaves them."""
    info = tmp_path / "site" / "toy_rewards-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / f"{MODULE}.py").write_text(CODE)
    (info / "entry_points.txt").write_text(POINTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-rewards\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry.cache_clear()
    yield
    registry.cache_clear()
    sys.modules.pop(MODULE, None)


def entries(rewards: Any) -> list[RewardEntry]:
    found = check_config({**VALUES, "rewards": rewards}).rewards
    assert found is not None
    return found


def refused(rewards: Any, **changes: Any) -> str:
    with pytest.raises(FtError) as caught:
        check_config({**VALUES, "rewards": rewards, **changes})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_and_entries() -> None:
    first, second, third = entries(
        ["toy-plain", {"name": "toy-own", "weight": -0.5, "on_error": "skip", "target": 7}, "judge.py:score"]
    )
    assert (first.name, first.weight, first.on_error, first.settings, first.file) == (
        "toy-plain",
        1.0,
        "stop",
        {},
        None,
    )
    assert (second.weight, second.on_error, second.settings) == (-0.5, "skip", {"target": 7})
    assert third.file == ("judge.py", "score")
    assert check_config(VALUES).rewards is None


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("rewards/my judge.py:score", ("rewards/my judge.py", "score")),
        ("C:/judges/one.py:score", ("C:/judges/one.py", "score")),
        ("judge:score", None),
        ("judge.py", None),
    ],
)
def test_what_is_a_file(name: str, file: tuple[str, str] | None) -> None:
    assert RewardEntry(name=name).file == file


def test_a_rewards_own_settings() -> None:
    (entry,) = entries([{"name": "toy-own", "schema": {"type": "object"}}])
    settings: Any = reward_settings(entry, "rewards.0")
    assert (settings.target, settings.shape) == (3, {"type": "object"})
    assert reward_settings(RewardEntry(name="toy-plain"), "rewards.0") is None
    assert reward_settings(RewardEntry(name="a.py:f", anything=1), "rewards.0") is None  # for the function to take


def test_the_resolved_configuration_says_the_same_again() -> None:
    config = check_config({**VALUES, "rewards": ["toy-plain", {"name": "toy-own", "target": 5}]})
    again = check_config(yaml.safe_load(to_yaml(config)))
    assert again.rewards == config.rewards
    assert yaml.safe_load(to_yaml(config))["rewards"] == [
        {"name": "toy-plain", "weight": 1.0, "on_error": "stop"},
        {"name": "toy-own", "weight": 1.0, "on_error": "stop", "target": 5},
    ]


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([], "rewards: [] is not allowed (allowed: at least one reward)"),
        ("toy-plain", "rewards: 'toy-plain' is not allowed (allowed: a list)"),
        ([""], "rewards.0.name: '' is not allowed (allowed: text that is not empty)"),
        ([{"weight": 1}], "rewards.0.name: is missing, and has no default"),
        ([3], "rewards.0: 3 is not allowed (allowed: keys with values)"),
        ([{"name": "toy-plain", "weight": "much"}], "rewards.0.weight: 'much' is not allowed (allowed: a number)"),
        ([{"name": "toy-plain", "weight": True}], "rewards.0.weight: True is not allowed (allowed: a number)"),
        (
            [{"name": "toy-plain", "weight": float("nan")}],
            "rewards.0.weight: nan is not allowed (allowed: a finite number)",
        ),
        (
            [{"name": "toy-plain", "weight": float("inf")}],
            "rewards.0.weight: inf is not allowed (allowed: a finite number)",
        ),
        (
            [{"name": "toy-plain", "on_error": "stopp"}],
            "rewards.0.on_error: 'stopp' is not allowed; did you mean 'stop'? (allowed: stop, skip, zero)",
        ),
        (
            [{"name": "toy-plain", "target": 1}],
            "unknown key 'rewards.0.target' (allowed in rewards.0: name, weight, on_error)",
        ),
        (
            ["toy-plain", {"name": "toy-own", "targt": 1}],
            "unknown key 'rewards.1.targt'; did you mean 'rewards.1.target'? "
            "(allowed in rewards.1: name, weight, on_error, target, schema, inner)",
        ),
        (
            [{"name": "toy-own", "target": 0}],
            "rewards.0.target: 0 is not allowed (allowed: greater than or equal to 1)",
        ),
        (
            [{"name": "toy-own", "inner": {"dep": 1}}],
            "unknown key 'rewards.0.inner.dep'; did you mean 'rewards.0.inner.deep'? "
            "(allowed in rewards.0.inner: deep)",
        ),
    ],
    ids=str,
)
def test_a_mistake(rewards: Any, said: str) -> None:
    assert refused(rewards) == said


def test_an_unknown_name_leads_to_the_nearest_and_to_all() -> None:
    message = refused(["toy-plane"])
    assert message.startswith("rewards.0: no reward 'toy-plane'; did you mean 'toy-plain'? (allowed: ")
    assert "toy-own" in message
    assert message.endswith("; a function of yours is file.py:function")


def test_a_method_without_rewards_refuses_them() -> None:
    assert refused(["toy-plain"], method="sft") == "rewards: the method 'sft' takes none; remove the key"
    assert check_config({**VALUES, "method": "sft", "rewards": None}).rewards is None


def test_a_missing_file_is_said_before_the_model_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {**VALUES, "output": str(tmp_path / "run"), "rewards": ["toy-plain", "judge.py:score"]}
    assert isinstance(check_config(values), TrainConfig)  # a finished run is opened without it
    with pytest.raises(ConfigError, match=r"^rewards\.1: no file judge\.py, looked for from "):
        train(values, say=lambda line: None)
    assert not (tmp_path / "run").exists()
