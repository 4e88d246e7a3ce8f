"""Reads a configuration from YAML and ``key=value`` words, and turns every mistake into one line."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

from ft_core.config.aliases import meant_by
from ft_core.config.numbers import Section
from ft_core.config.rope import RopeScaling, named
from ft_core.config.schema import RewardEntry, TrainConfig
from ft_core.console import some
from ft_core.errors import ConfigError, PluginError
from ft_core.plugins import EXTRAS, MethodSpec, ModalitySpec, RewardSpec, registry, resolve

__all__ = [
    "check_config",
    "load_config",
    "method_settings",
    "modality_settings",
    "parse_overrides",
    "read_rope_scaling",
    "reward_settings",
    "to_yaml",
]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a configuration file, apply ``key=value`` overrides, and check it whole.

    Raises:
        ConfigError: one line with the key, the value, what is allowed and the nearest right spelling.
        PluginError: the method or task is not installed; the message says what to install.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        values = yaml.load(text, _UniqueKeys)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        line, column, what = _problem(text, error)
        raise ConfigError(f"{path}:{line}:{column}: no valid YAML: {what}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys with values, such as 'model: …', not {_kind(values)}")
    return check_config(_merge(values, parse_overrides(overrides)))


def check_config(values: Mapping[str, Any] | TrainConfig) -> TrainConfig:
    """Validate a configuration and the method's own section of it; see :func:`load_config` for what it raises."""
    if isinstance(values, TrainConfig):
        config = values
    else:
        named = [name for name in registry().names(ModalitySpec.group) if name in values]
        values = {key: value for key, value in values.items() if (key, value) != ("task", None)}
        values = {"task": named[0], **values} if len(named) == 1 else values  # that whose section is there
        if values.get("quantization") == "fp8":
            raise ConfigError("quantization: 'fp8' is not available in this version (allowed: none, nf4, int8)")
        _check_top_level(values, *(values.get(k, TrainConfig.model_fields[k].default) for k in ("method", "task")))
        try:
            config = TrainConfig.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_one_line(error, TrainConfig, "")) from None
    _check_top_level(config.sections, config.method, config.task)
    try:
        modality = registry().get(ModalitySpec, config.task)
    except PluginError as error:
        raise PluginError(f"task: {error}") from error
    if modality.load is None:
        raise PluginError(f"task: {config.task!r} cannot be trained by the installed version ({modality.summary})")
    known = {*registry().names(MethodSpec.group), *EXTRAS[MethodSpec.group]}
    if modality.methods and config.method in known - {*modality.methods}:
        what = f"{config.method!r} does not train the task {config.task!r} yet"
        raise ConfigError(f"method: {what} (allowed: {', '.join(modality.methods)})")
    method_settings(config)
    modality_settings(config)
    _check_rewards(config)
    return config


def method_settings(config: TrainConfig) -> BaseModel:
    """The method's own section, validated by the method's model; see :func:`load_config` for what it raises."""
    try:
        spec = registry().get(MethodSpec, config.method)
    except PluginError as error:
        raise PluginError(f"method: {error}") from error
    return _section(config, config.method, resolve(spec.settings))


def modality_settings(config: TrainConfig) -> BaseModel | None:
    """The section of the modality that ``task`` names, as :func:`method_settings`; None where it has none."""
    spec = registry().get(ModalitySpec, config.task)
    return _section(config, config.task, resolve(spec.settings)) if spec.settings else None


def _section(config: TrainConfig, name: str, model: type[BaseModel]) -> BaseModel:
    section = config.sections.get(name)
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"{name}: {_shown(section)} is not allowed (allowed: keys with values)")
    try:
        return model.model_validate(dict(section or {}))
    except ValidationError as error:
        raise ConfigError(_one_line(error, model, name)) from None


def reward_settings(entry: RewardEntry, where: str) -> BaseModel | None:
    """A reward's own settings, validated by the reward's model; None where it has none or is a function of the user's.

    Args:
        where: the entry's place in the configuration, such as ``rewards.0``.

    Raises:
        ConfigError: one line with the key, the value, what is allowed and the nearest right spelling.
        PluginError: the reward is not installed; the message names the nearest and all that are.
    """
    if entry.file is not None:
        return None
    try:
        spec = registry().get(RewardSpec, entry.name)
    except PluginError as error:
        raise PluginError(f"{where}: {error}; a function of yours is file.py:function") from error
    if spec.settings is None:
        if entry.settings:
            raise ConfigError(_unknown(next(iter(entry.settings)), f"{where}.", list(RewardEntry.model_fields)))
        return None
    model: type[BaseModel] = resolve(spec.settings)
    try:
        return model.model_validate(entry.settings)
    except ValidationError as error:
        unknown = [e["loc"][0] for e in error.errors() if e["type"] == "extra_forbidden" and len(e["loc"]) == 1]
        if unknown:
            keys = [*RewardEntry.model_fields, *(f.alias or name for name, f in model.model_fields.items())]
            raise ConfigError(_unknown(str(unknown[0]), f"{where}.", keys)) from None
        raise ConfigError(_one_line(error, model, where)) from None


def _check_rewards(config: TrainConfig) -> None:
    if config.rewards is None:
        return
    if not registry().get(MethodSpec, config.method).rewards:
        raise ConfigError(f"rewards: the method {config.method!r} takes none; remove the key")
    for number, entry in enumerate(config.rewards):
        reward_settings(entry, f"rewards.{number}")


class _Given(Section):
    rope_scaling: Annotated[RopeScaling | None, BeforeValidator(named)]


def read_rope_scaling(value: str | Mapping[str, Any] | RopeScaling | None) -> RopeScaling | None:
    """``rope_scaling`` as the configuration has it: a type's name, or keys with values; None is none.

    Raises:
        ConfigError: one line with the key, the value, what is allowed and the nearest right spelling.
    """
    try:
        return _Given.model_validate({"rope_scaling": value}).rope_scaling
    except ValidationError as error:
        raise ConfigError(_one_line(error, _Given, "")) from None


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``["training.max_steps=100", "lora=null"]`` as nested values, each read as YAML.

    Raises:
        ConfigError: a word without ``=`` or with a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{word!r} is no override: write key=value, such as training.max_steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key} is no valid YAML: {text!r} ({_problem(text, error)[2]})") from error
        below = values
        for part in parts[:-1]:
            if not isinstance(below.get(part), dict):
                below[part] = {}
            below = below[part]
        below[parts[-1]] = value
    return values


def to_yaml(config: TrainConfig, *, header: bool = True) -> str:
    """The resolved configuration as YAML, every key with its value, the method's own section included.

    Args:
        header: begin with a comment that says how it is trained, once it stands in a file ``config.yaml``.
    """
    values = config.model_dump(mode="json")
    values[config.method] = method_settings(config).model_dump(mode="json")
    if (settings := modality_settings(config)) is not None:
        values[config.task] = settings.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if not header:
        return text
    words = shlex.join(["ft", "train", "config.yaml", f"output={config.output}"])
    return f"# {' '.join(words.split())}\n{text}"


def _problem(text: str, error: yaml.YAMLError) -> tuple[int, int, str]:
    """The line and column, from 1, as editors count, and what is wrong there."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.problem, error.context) if part)
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    else:  # a character that YAML does not allow
        before = text[: getattr(error, "position", 0)]
        line, column = before.count("\n"), len(before) - (before.rfind("\n") + 1)
        what = str(error).splitlines()[0]
    return line + 1, column + 1, what


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _check_top_level(values: Iterable[Any], method: Any, task: Any) -> None:
    """A key that the schema doesn't have must be a section in use; asked first, or `modle: …` would lack a `model`."""
    methods = {*registry().names("ft.methods"), *EXTRAS["ft.methods"]}
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"unknown key {key!r}: a key is a word (allowed: {', '.join(TrainConfig.model_fields)})")
        if key in TrainConfig.model_fields or key in (method, task):
            continue
        if key in methods and method not in methods:
            continue  # what is wrong is the method
        if key in methods:
            raise ConfigError(f"{key}: these are settings of the method {key!r}, but the method is {method!r}")
        if key in (tasks := registry().names("ft.modalities")) and task in tasks:
            raise ConfigError(f"{key}: these are settings of the task {key!r}, but the task is {task!r}")
        section = [method] if isinstance(method, str) else []
        raise ConfigError(_unknown(key, "", [*TrainConfig.model_fields, *section]))


def _unknown(key: str, where: str, allowed: list[str]) -> str:
    meant = meant_by(key, where, allowed)
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"unknown key {where + key!r}{hint} (allowed{' in ' + where[:-1] if where else ''}: {', '.join(allowed)})"


def _one_line(error: ValidationError, model: type[BaseModel], prefix: str) -> str:
    """The first mistake of a validation error: key, value, what is allowed, and the nearest right spelling."""
    errors = error.errors()
    # A union reports every branch that failed: an unknown key says more than the rest, then what lies deepest.
    same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    first = next((e for e in errors if e["type"] == "extra_forbidden"), max(same, key=lambda e: len(_names(e))))
    names = _names(first)
    key = ".".join(([prefix] if prefix else []) + names)
    others = len({e["loc"][0] for e in errors if e["loc"]}) - 1
    more = f" (and {others} more)" if others > 0 else ""
    value = _shown(first.get("input"))
    if first["type"] == "extra_forbidden":
        below = _model_at(model, names[:-1])
        where = ".".join(([prefix] if prefix else []) + names[:-1])
        return _unknown(names[-1], where + "." if where else "", list(below.model_fields) if below else []) + more
    if first["type"] == "missing":
        return f"{key}: is missing, and has no default{more}"
    if first["type"] == "value_error" and not names:
        return first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        allowed = _literals(errors, names)
        word = value.strip("'\"").lower()
        close = [MEANT[word]] if MEANT.get(word) in allowed else difflib.get_close_matches(word, allowed, 1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{key}: {value} is not allowed{hint} (allowed: {', '.join(allowed)}){more}"
    reasons = dict.fromkeys(_reason(e) for e in errors if _names(e) == names)
    note = ""
    if isinstance(first.get("input"), bool) and "text" in reasons:
        note = "; YAML reads the words on, off, yes and no as true and false: one that is meant goes in quotes"
    return f"{key}: {value} is not allowed (allowed: {' or '.join(reasons)}{note}){more}"


MEANT = {
    **dict.fromkeys(("4", "4bit", "4-bit", "int4", "fp4", "qlora"), "nf4"),
    **dict.fromkeys(("8", "8bit", "8-bit", "llm.int8"), "int8"),
}
"""What others call a value, where the spelling would lead to another one: '4bit' is closer to int8 than to nf4."""

REASONS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    "model_type": "keys with values",
    "dict_type": "keys with values",
    "model_attributes_type": "keys with values",
}
"""What is allowed, where pydantic's own words are about Python rather than about the configuration."""


def _reason(error: Any) -> str:
    text = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    return REASONS.get(error["type"], text)


def _names(error: Any) -> list[str]:
    """The keys that lead to a mistake, without pydantic's names for the branches of a union."""
    if not error["loc"]:
        return []
    *above, last = error["loc"]
    names = [str(part) for part in above if not _is_branch(part)]
    # An unknown key is what the user wrote, whatever it looks like.
    is_key = error["type"] in ("extra_forbidden", "missing") or not _is_branch(last)
    return [*names, str(last)] if is_key else names


def _literals(errors: list[Any], names: list[str]) -> list[str]:
    found: list[str] = []
    for e in errors:
        if e["type"] == "literal_error" and _names(e) == names:
            found += [w.strip().strip("'") for w in e["ctx"]["expected"].replace(" or ", ", ").split(",")]
        elif e["type"] == "list_type" and _names(e) == names:
            found.append("a list of names")
    return found


def _is_branch(part: object) -> bool:
    """Whether a location's part is pydantic's name for a branch of a union rather than a key of the user's."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool", "DataSource", "LoraSettings") or part.endswith("]") or "-" in part
    )


def _model_at(model: type[BaseModel], names: list[str]) -> type[BaseModel] | None:
    """The schema of a nested section, found along the keys that lead to it."""
    for name in names:
        if name.isdigit():
            continue
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        found = _find_model(annotation)
        if found is None:
            return None
        model = found
    return model


def _find_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_find_model, get_args(annotation)) if m), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _kind(value: Any) -> str:
    return {"NoneType": "nothing", "str": "a word", "list": "a list"}.get(type(value).__name__, type(value).__name__)


def _nearest_file(path: Path) -> str:
    """What lies where a configuration was looked for: the one of a similar name, or a few; no other kind of file."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    stems = {p.stem: p.name for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".yml") and p.is_file()}
    close = difflib.get_close_matches(path.stem, stems, 1, cutoff=0.6)
    names = [stems[close[0]]] if close else list(stems.values())
    if not names:
        return f" (in {folder.resolve()} there is no YAML file)"
    verb = "is" if len(names) == 1 else "are"
    return f" (in {folder.resolve()} there {verb} {some([repr(name) for name in names])})"
