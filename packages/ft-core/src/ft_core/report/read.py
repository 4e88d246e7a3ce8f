"""Read a run folder as far as it has got: every file may be missing, and the last line of the metrics cut short."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ft_core.errors import RunError
from ft_core.runs import RUN_FORMAT, no_run

__all__ = ["RunRecord", "mapping", "number", "read_run"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        path: the folder, as the caller named it.
        config, environment: the files of those names; empty where they are not there or cannot be read.
        summary, evaluation: likewise, None where there is none.
        train, evals: the lines of ``metrics.jsonl`` of either kind, by rising step; of two lines for one step (a run
            that was resumed) the later counts.
        samples: the lines of ``samples.jsonl``, by step and then by their rank, ``best`` or ``worst``.
        skipped_lines: lines of ``metrics.jsonl`` that did not parse.
        notes: a sentence for each file that is there but cannot be used.
    """

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    train: tuple[Mapping[str, Any], ...] = ()
    evals: tuple[Mapping[str, Any], ...] = ()
    samples: Mapping[float, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    skipped_lines: int = 0
    notes: tuple[str, ...] = ()


def number(value: Any) -> float | None:
    """``value`` as a float (NaN and infinities included), or None if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def read_run(run: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        RunError: there is no such folder, it holds no run, or a newer version of ft wrote it.
    """
    if not run.is_dir():
        if not run.exists():
            raise RunError(no_run(run))
        raise RunError(f"{run} is a file, not a run folder: name the folder that `ft train` wrote (its `output`)")
    if not any((run / name).is_file() for name in ("environment.json", "config.yaml")):
        raise RunError(
            f"{run} is no run folder: it has neither environment.json nor config.yaml; "
            "name a folder that `ft train` wrote"
        )
    notes: list[str] = []
    environment = _read_json(run / "environment.json", notes)
    version = number(mapping(environment).get("run_format"))
    if version is not None and version > RUN_FORMAT:
        raise RunError(f"{run} has run_format {version:g}, this ft-core reads up to {RUN_FORMAT}: upgrade ft-core")
    train, evals, skipped = _read_metrics(run / "metrics.jsonl", notes)
    return RunRecord(
        path=run,
        config=_read_config(run / "config.yaml", notes),
        environment=environment or {},
        summary=_read_json(run / "summary.json", notes),
        evaluation=_read_json(run / "evaluation.json", notes),
        train=train,
        evals=evals,
        samples=_read_samples(run / "samples.jsonl", notes),
        skipped_lines=skipped,
        notes=tuple(notes),
    )


def _text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror or error}).")
        return None


def _read_json(path: Path, notes: list[str]) -> Mapping[str, Any] | None:
    text = _text(path, notes)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is not valid JSON and is left out.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is no JSON object and is left out.")
        return None
    return value


def _read_config(path: Path, notes: list[str]) -> Mapping[str, Any]:
    text = _text(path, notes)
    if text is None:
        return {}
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"{path.name} is not valid YAML and is left out.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is no YAML mapping and is left out.")
        return {}
    return value


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[float, Mapping[str, Any]] | None]:
    """Each line's step and content; None for one that is no JSON object with a step."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    step = number(row["step"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    step = None
                yield None if step is None or not math.isfinite(step) else (step, row)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror or error}).")


def _read_metrics(
    path: Path, notes: list[str]
) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...], int]:
    kinds: dict[str, dict[float, Mapping[str, Any]]] = {"train": {}, "eval": {}}
    skipped = 0
    for found in _rows(path, notes):
        kind = None if found is None else found[1].get("kind")
        if found is None or kind is None or isinstance(kind, dict | list):
            skipped += 1
        elif kind in kinds:  # a kind of a later version is none of ours, and no damage
            kinds[kind][found[0]] = found[1]
    train, evals = (tuple(rows[step] for step in sorted(rows)) for rows in kinds.values())
    return train, evals, skipped


def _read_samples(path: Path, notes: list[str]) -> dict[float, dict[str, Mapping[str, Any]]]:
    steps: dict[float, dict[str, Mapping[str, Any]]] = {}
    for found in _rows(path, notes):
        if found is not None and found[1].get("rank") in ("best", "worst"):
            steps.setdefault(found[0], {})[found[1]["rank"]] = found[1]
    return steps
