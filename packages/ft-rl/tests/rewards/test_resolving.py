"""From the configuration's list to functions: what is found, and what is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ft_core.config.load import check_config
from ft_core.errors import ConfigError, DataError, FtError
from ft_core.plugins import EXTRAS, RewardSpec, registry, resolve
from ft_rl.rewards import Rewards, resolve_rewards

BUILT_IN = {
    "exact-match",
    "numeric",
    "math",
    "regex",
    "format",
    "length",
    "json-schema",
    "code",
    "reward-model",
    "http",
    "reasoning-gym",
}


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the user's, in the working folder, with a module beside it."""
    monkeypatch.chdir(tmp_path)
    Path("beside_the_judge.py").write_text("WORD = 'please'\n")
    Path("judge.py").write_text(
        "from dataclasses import dataclass\n"
        "import beside_the_judge\n"
        "ran = []\n"
        "@dataclass\n"
        "class Other:\n"
        "    x: int\n"
        "def polite(prompts, completions, **columns):\n"
        "    return [float(beside_the_judge.WORD in text) for text in completions]\n"
        "def long(prompts, completions, least=3, **columns):\n"
        "    return [float(len(text) >= least) for text in completions]\n"
        "def narrow(prompts, completions):\n"
        "    return [0.0 for _ in completions]\n"
        "async def late(prompts, completions, **columns):\n"
        "    import asyncio\n"
        "    await asyncio.sleep(0)\n"
        "    return [float(len(text)) for text in completions]\n"
        "number = 3\n"
    )
    yield tmp_path / "judge.py"
    sys.modules.pop("beside_the_judge", None)


def refused(entries: Any) -> str:
    with pytest.raises(FtError) as caught:
        resolve_rewards(entries)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_built_in() -> None:
    assert {e.name for e in registry().entries("ft.rewards") if e.distribution == "ft-rl"} == BUILT_IN
    assert set(EXTRAS["ft.rewards"]) == BUILT_IN
    for name in BUILT_IN:
        spec = registry().get(RewardSpec, name)
        assert callable(resolve(spec.reward))
        assert resolve(str(spec.settings)).model_config["extra"] == "forbid"


def test_names_weights_and_values() -> None:
    rewards = resolve_rewards(["exact-match", {"name": "regex", "pattern": "^4", "weight": -0.5}])
    assert (rewards.names, rewards.weights) == (["exact-match", "regex"], [1.0, -0.5])
    assert [function.__name__ for function in rewards.functions] == ["exact-match", "regex"]
    each, totals = rewards.score(["2+2", "2+2", "2+2"], ["4", "5", "44"], answer=["4", "4", "4"])
    assert each == [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    assert totals == [0.5, 0.0, -0.5]


def test_the_same_name_twice() -> None:
    entry = {"name": "regex", "pattern": "a"}
    assert resolve_rewards([entry, entry, "exact-match", entry]).names == ["regex", "regex-2", "exact-match", "regex-3"]


def test_a_function_of_the_users(judge: Path) -> None:
    path = list(sys.path)
    rewards = resolve_rewards(["judge.py:polite", {"name": f"{judge}:long", "least": 7}])
    assert sys.path == path  # the file's folder was there while it ran, not after
    assert rewards.names == ["polite", "long"]
    each, _ = rewards.score(["", ""], ["yes please", "no"])
    assert each == [[1.0, 0.0], [1.0, 0.0]]
    assert resolve_rewards(["judge.py:long"]).score([""], ["abc"])[1] == [1.0]  # its own default
    assert "judge" not in sys.modules


def test_a_coroutine_function_in_and_out_of_a_running_loop(judge: Path) -> None:
    import asyncio

    (late,) = resolve_rewards(["judge.py:late"]).functions
    assert late(prompts=["", ""], completions=["a", "bb"]) == [1.0, 2.0]

    async def inside() -> list[float | None]:
        return late(prompts=["", ""], completions=["a", "bb"])

    assert asyncio.run(inside()) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py:f", "rewards.0: no file nowhere.py, looked for from "),
        ("judge.py:polit", "rewards.0: judge.py has no 'polit'; did you mean 'polite'? (it has: Other, polite, long, "),
        (
            "judge.py:number",
            "rewards.0: judge.py:number is of type int: give a function f(prompts, completions, **columns)",
        ),
        ("judge.py:Other", "rewards.0: judge.py:Other is a class: give a function f(prompts, completions, **columns)"),
        ("judge.py:narrow", "rewards.0: judge.py:narrow must take further keywords, since every column "),
        ("broken.py:f", "rewards.0: broken.py fails to run: ZeroDivisionError: division by zero"),
        ("syntax.py:f", "rewards.0: syntax.py fails to run: SyntaxError: "),
        ("leaves.py:f", "rewards.0: leaves.py fails to run: SystemExit: 3"),
    ],
)
def test_a_file_that_cannot_be_used(judge: Path, name: str, said: str) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("syntax.py").write_text("def f(:\n")
    Path("leaves.py").write_text("raise SystemExit(3)\n")
    modules = set(sys.modules)
    assert refused([name]).startswith(said)
    assert not {m for m in set(sys.modules) - modules if "broken" in m or "syntax" in m or "leaves" in m}


def test_a_setting_that_the_trainer_uses(judge: Path) -> None:
    assert refused([{"name": "judge.py:polite", "completion_ids": 1}]) == (
        "rewards.0: 'completion_ids' is what the trainer hands to a reward: call the setting otherwise"
    )
    (long,) = resolve_rewards([{"name": "judge.py:long", "least": 7}]).functions
    with pytest.raises(DataError, match="reward 'long': 'least' is a setting of it and a column of the data"):
        long(prompts=[""], completions=[""], least=[1])


def test_no_reward_and_unknown_ones() -> None:
    assert refused(None).startswith("rewards: is missing: give a list of names (installed: ")
    message = refused(["exact-mtch"])
    assert message.startswith("rewards.0: no reward 'exact-mtch'; did you mean 'exact-match'? (allowed: ")
    assert all(name in message for name in BUILT_IN)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "regex"}, "rewards.0.pattern: is missing, and has no default"),
        ({"name": "regex", "pattern": "("}, "rewards.0.pattern: '(' is not allowed (allowed: a regular expression of "),
        ({"name": "length"}, "length takes one of target and max"),
        ({"name": "length", "target": 1, "max": 2}, "length takes one of target and max"),
        (
            {"name": "exact-match", "part": "tags"},
            "rewards.0.part: 'tags' is not allowed; did you mean 'tag'? (allowed: ",
        ),
        (
            {"name": "http", "url": "file:///etc/passwd"},
            "rewards.0.url: 'file:///etc/passwd' is not allowed (allowed: an ",
        ),
        ({"name": "json-schema"}, "json-schema takes one of schema and column"),
        ({"name": "json-schema", "schem": {}}, "unknown key 'rewards.0.schem'; did you mean 'rewards.0.schema'? "),
        ({"name": "code", "memory": "lots"}, "rewards.0.memory: 'lots' is not allowed (allowed: "),
    ],
    ids=str,
)
def test_settings_are_checked(entry: dict[str, Any], said: str) -> None:
    assert refused([entry]).startswith(said)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "math"}, 'rewards.0 (math): math-verify is not installed: pip install "ft-rl[math]"'),
        (
            {"name": "json-schema", "schema": {}},
            'rewards.0 (json-schema): jsonschema is not installed: pip install "ft-rl[json]"',
        ),
        (
            {"name": "reasoning-gym"},
            'rewards.0 (reasoning-gym): reasoning-gym is not installed: pip install "ft-rl[gym]"',
        ),
    ],
    ids=str,
)
def test_a_package_that_is_missing(entry: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused([entry]) == said


def test_a_reward_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With settings of its own the spec names what makes the function, without it names the function."""
    info = tmp_path / "toy_judges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-judges\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ft.rewards]\ntoy = toy_judges:TOY\ntoy-made = toy_judges:MADE\n")
    (tmp_path / "toy_judges.py").write_text(
        "from ft_core.plugins import RewardSpec\n"
        "from pydantic import BaseModel\n"
        "class Settings(BaseModel):\n"
        "    least: int = 2\n"
        "def toy(prompts, completions, **columns):\n"
        "    return [1.0 for _ in completions]\n"
        "def make(settings):\n"
        "    if settings.least > 9:\n"
        "        raise ValueError('least is above 9')\n"
        "    return lambda prompts, completions, **columns: [float(len(c) >= settings.least) for c in completions]\n"
        "TOY = RewardSpec(name='toy', summary='', reward='toy_judges:toy')\n"
        "MADE = RewardSpec(name='toy-made', summary='', reward='toy_judges:make', settings='toy_judges:Settings')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry.cache_clear()
    try:
        rewards = resolve_rewards(["toy", "toy-made", {"name": "toy-made", "least": 4}])
        assert rewards.names == ["toy", "toy-made", "toy-made-2"]
        assert rewards.score(["p", "p"], ["a", "abc"])[0] == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
        assert refused([{"name": "toy-made", "least": 10}]) == "rewards.0 (toy-made): least is above 9"
    finally:
        registry.cache_clear()
        sys.modules.pop("toy_judges", None)


def test_a_method_that_takes_none_refuses_them() -> None:
    with pytest.raises(ConfigError, match=r"^rewards: the method 'reward' takes none; remove the key$"):
        check_config({"model": "m", "data": "d", "method": "reward", "rewards": ["exact-match"]})


def test_missing_columns_are_said_before_training() -> None:
    rewards = resolve_rewards(["exact-match", {"name": "numeric", "column": "result"}])
    assert isinstance(rewards, Rewards)
    rewards.check_columns(["prompt", "solution", "result"])
    with pytest.raises(DataError, match="reward 'exact-match' needs the column 'answer' or 'solution', which"):
        rewards.check_columns(["prompt", "result"])
    with pytest.raises(DataError, match="reward 'numeric' needs the column 'result'"):
        rewards.check_columns(["prompt", "answer"])
    with pytest.raises(
        DataError, match=r"reward 'exact-match': the data has no column 'answer' or 'solution' \(it has"
    ):
        rewards.score(["a"], ["b"], result=["c"])
