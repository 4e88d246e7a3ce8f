"""The reward ``json-schema``: whether the completion is JSON that fits a schema."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ft_core.errors import ConfigError
from ft_rl.rewards.extraction import in_tag
from ft_rl.rewards.samples import Text, column_of, score_each, text_of

__all__ = ["JsonSchemaSettings", "json_in", "json_schema"]

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:json)?[ \t]*\n(?P<code>.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


class JsonSchemaSettings(BaseModel):
    """Settings of ``json-schema``; one of ``schema`` and ``column`` is given.

    Attributes:
        schema: a JSON schema, as keys with values or the path of a JSON file.
        column: the data's column with each row's schema, as an object or as text.
        part: where the JSON is: the ``whole`` completion, the last block between fences (``fenced``), or a ``tag``.
        tag: the tag's name.
        parsed: the reward of JSON that doesn't fit.
    """

    model_config = ConfigDict(extra="forbid")

    shape: dict[str, Any] | str | None = Field(default=None, alias="schema")
    column: str | None = None
    part: Literal["whole", "fenced", "tag"] = "whole"
    tag: str = Field(default="answer", min_length=1)
    parsed: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> JsonSchemaSettings:
        if (self.shape is None) == (self.column is None):
            raise ValueError("json-schema takes one of schema and column")
        return self


def json_schema(settings: JsonSchemaSettings) -> Any:
    """The reward function: 1.0 for JSON that fits the schema, ``parsed`` for other JSON, 0.0 for the rest.

    JSON is what the standard says: NaN and Infinity are none. A reference to another schema is never fetched.

    Raises:
        ConfigError: jsonschema isn't installed, or the schema is none.
    """
    if importlib.util.find_spec("jsonschema") is None:
        raise ConfigError('jsonschema is not installed: pip install "ft-rl[json]"')
    fixed = None if settings.shape is None else _validator(_read(settings.shape))

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        schemas = column_of(columns, settings.column) if settings.column else []

        def score(i: int) -> float:
            validator = fixed
            if validator is None:
                text = schemas[i]
                try:
                    validator = _validator(_parsed(text) if isinstance(text, str) else text)
                except ConfigError as error:  # of this row alone
                    raise ValueError(f"the row's {settings.column}: {error}") from error
            found = json_in(text_of(completions[i]), settings)
            if found is None:
                return 0.0
            try:
                value = _parsed(found)
            except (ValueError, RecursionError):
                return 0.0
            try:
                return 1.0 if validator.is_valid(value) else settings.parsed
            except RecursionError:
                return settings.parsed

        return score_each(len(completions), score)

    if settings.column:
        reward.columns = (settings.column,)  # type: ignore[attr-defined]
    return reward


def json_in(text: str, settings: JsonSchemaSettings) -> str | None:
    """The part of a completion that should be JSON; None where there is no such part."""
    if settings.part == "tag":
        return in_tag(text, settings.tag)
    if settings.part == "fenced":
        return next((match["code"] for match in reversed(list(_FENCE.finditer(text)))), None)
    return text


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_no_json)


def _no_json(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _read(schema: dict[str, Any] | str) -> Any:
    if isinstance(schema, Mapping):
        return schema
    path = Path(schema).expanduser()
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"schema {schema} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"schema {schema} is no JSON: {error}") from error


def _validator(schema: Any) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if not isinstance(schema, Mapping | bool):
        raise ConfigError(f"a JSON schema is an object, not {str(schema)[:40]!r}")
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        raise ConfigError(f"no valid JSON schema: {place + ': ' if place else ''}{error.message}") from error
    return kind(schema, registry=Registry())  # one that holds nothing and fetches nothing
