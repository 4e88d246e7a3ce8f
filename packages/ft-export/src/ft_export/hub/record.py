"""What a run's own files say of the model, for its card; nothing is made up, and no local path comes along."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from ft_export.errors import ExportError
from ft_export.hub.wanted import HUB_NAME
from ft_export.runs import Source, read_json

__all__ = ["Record", "is_local", "read_record"]

DATA_SET = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)((:(?P<config>[\w.-]+))?:(?P<split>\w[^/\\]*))?"
)
DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".txt"}


@dataclass(frozen=True)
class Record:
    """A run's files, read; empty where there is no run.

    Attributes:
        config, environment, summary, evaluation: what they say, see docs/run-folder.md.
        base: the base model's name on the Hub, or None where it has none that is known.
        base_folder: the folder of the base model on this machine, or None.
        data: the names of the training data to show to people: a file's name without its folder, a data set's.
        data_sets: those of them that look like data sets on the Hub.
    """

    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    base_folder: Path | None = None
    data: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()


def read_record(source: Source, base: str | None) -> Record:
    """What is known of ``source``.

    Args:
        base: the base model's name on the Hub, where the person has said it.

    Raises:
        ExportError: a file of the run is broken.
    """
    run = _run_of(source)
    files = {name: _read(run, name) for name in ("environment", "summary", "evaluation")}
    config = _config(run)
    known = files["environment"].get("base_model")
    known = known if isinstance(known, dict) else {}
    named = read_json(source.adapter / "adapter_config.json") if source.adapter is not None else {}
    references = [known.get("reference"), known.get("name"), known.get("path"), named.get("base_model_name_or_path")]
    path = known.get("path")
    if isinstance(path, str) and is_local(path):
        references = [path]  # the others may be relative to the folder of the training, and look like a Hub name here
    said = [reference for reference in references if isinstance(reference, str) and reference]
    on_hub = [reference for reference in said if HUB_NAME.fullmatch(reference) and not is_local(reference)]
    folders = [Path(reference).expanduser() for reference in said if is_local(reference)]
    there = [folder for folder in folders if folder.is_dir()]
    if not said and source.model is not None and run is None:
        there = [source.model]  # a model that nothing is known about but its own files
    data = [_data(entry) for entry in _sources(config.get("data"))]
    return Record(
        config,
        files["environment"],
        files["summary"],
        files["evaluation"],
        base=base or next(iter(on_hub), None),
        base_folder=next(iter(there), None),
        data=tuple(dict.fromkeys(name for name, _ in data)),
        data_sets=tuple(dict.fromkeys(name for _, name in data if name is not None)),
    )


def is_local(reference: str) -> bool:
    """Whether a model's reference is a path on this machine rather than a name on the Hub."""
    if PurePath(reference).is_absolute() or PureWindowsPath(reference).is_absolute():
        return True
    if reference.startswith((".", "~")) or reference.count("/") > 1 or "\\" in reference:
        return True
    return Path(reference).exists()


def _run_of(source: Source) -> Path | None:
    """The run folder: the source itself, or the one that an adapter's folder lies in."""
    if source.is_run:
        return source.path
    above = source.path.absolute().parent
    in_run = source.path.absolute().name in ("adapter", "model") and (above / "environment.json").is_file()
    return above if in_run else None


def _read(run: Path | None, name: str) -> dict[str, Any]:
    path = run / f"{name}.json" if run is not None else None
    return read_json(path) if path is not None and path.is_file() else {}


def _config(run: Path | None) -> dict[str, Any]:
    import yaml

    path = run / "config.yaml" if run is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is not YAML: {error}") from error
    return said if isinstance(said, dict) else {}


def _sources(data: Any) -> list[str]:
    entries = data if isinstance(data, list) else [data]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [path for path in paths if isinstance(path, str) and path]


def _data(path: str) -> tuple[str, str | None]:
    """The name of a source to show, and the data set's on the Hub where it may be one."""
    named = DATA_SET.fullmatch(path)
    local = Path(path).expanduser()
    if named is None or local.suffix.lower() in DATA_FILES or local.exists():
        return PureWindowsPath(path).name or "a folder", None
    return path, named["name"]
