"""The reward `json-schema`, by the real jsonschema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ConfigError, RunError
from ft_rl.rewards import resolve_rewards

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


pytest.importorskip("jsonschema", reason='jsonschema is not installed: pip install "ft-rl[json]"')


def score(completion: str, *, columns: dict[str, Any] | None = None, **settings: Any) -> float | None:
    if not {"schema", "column"} & settings.keys():
        settings["schema"] = SCHEMA
    (reward,) = resolve_rewards([{"name": "json-schema", **settings}]).functions
    (value,) = reward(prompts=["p"], completions=[completion], **{k: [v] for k, v in (columns or {}).items()})
    return value


@pytest.mark.parametrize(
    ("completion", "settings", "value"),
    [
        ('{"name": "Ada", "age": 36}', {}, 1.0),
        (' \n{"name": "Ada"}\n', {}, 1.0),
        ('{"name": "Ada", "age": -1}', {}, 0.0),
        ('{"name": "Ada", "age": -1}', {"parsed": 0.25}, 0.25),
        ('{"name": "Ada", "more": 1}', {}, 0.0),
        ('{"name": "Ada"', {"parsed": 0.25}, 0.0),
        ('Here: {"name": "Ada"}', {}, 0.0),
        ('Here:\n```json\n{"name": "Ada"}\n```', {"part": "fenced"}, 1.0),
        ('{"name": "Ada"}', {"part": "fenced"}, 0.0),
        ('<answer>{"name": "Ada"}</answer>', {"part": "tag"}, 1.0),
        ("NaN", {"schema": {"type": "number"}}, 0.0),
        ("[" * 100_000 + "]" * 100_000, {"schema": {}}, 0.0),
        ("5", {"schema": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}}, 1.0),
    ],
)
def test_what_fits(completion: str, settings: dict[str, Any], value: float) -> None:
    assert score(completion, **settings) == value


def test_a_schema_of_each_row() -> None:
    for schema in ({"type": "integer"}, '{"type": "integer"}'):
        assert score("5", column="schema", columns={"schema": schema}) == 1.0
        assert score('"5"', column="schema", columns={"schema": schema}) == 0.0
    with pytest.raises(RunError, match="the row's schema: no valid JSON schema"):
        score("5", column="schema", columns={"schema": {"type": "whole"}})
    with pytest.raises(RunError, match="sample 1 of 1"):
        score("5", column="schema", columns={"schema": "{"})


def test_a_schema_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert score('{"name": "Ada"}', schema=str(path)) == 1.0
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no JSON: "):
        score("", schema=str(path))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        score("", schema=str(tmp_path / "none.json"))


def test_no_schema() -> None:
    with pytest.raises(ConfigError, match=r"^rewards\.0 \(json-schema\): no valid JSON schema: type: "):
        score("", schema={"type": "whole"})


def test_a_reference_elsewhere_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(urllib.request, "urlopen", fetched)
    with pytest.raises(RunError, match="Unresolvable"):
        score("5", schema={"$ref": "http://127.0.0.1:9/schema.json"})
