"""The run folder: how it is claimed and read, how its files are written. docs/run-folder.md is its contract."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ft_core.console import some
from ft_core.errors import ConfigError, RunError

__all__ = ["RUN_FORMAT", "Run", "no_run", "runs_in", "write_json", "write_text"]

RUN_FORMAT = 1


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no reader and no crash sees half of it.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:  # an interruption leaves nothing behind either
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`, with ``value`` as JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


class Run:
    """One run folder, by the names of its parts."""

    CONFIG = "config.yaml"
    ENVIRONMENT = "environment.json"
    METRICS = "metrics.jsonl"
    SAMPLES = "samples.jsonl"
    SUMMARY = "summary.json"
    HELD_OUT = "held_out.jsonl"
    EVALUATION = "evaluation.json"
    PARTIAL = "evaluation-partial.json"
    REPORT = "report.html"

    def __init__(self, path: str | Path) -> None:
        try:
            self.path = Path(path).expanduser()
        except RuntimeError as error:
            raise RunError(f"{path}: {error}") from error
        if self.path.name in ("", ".."):  # `.` and `..`: what lies beside the folder takes its name
            self.path = self.path.resolve()
        if not self.path.name:
            raise RunError(f"{path} cannot be a run folder: give a folder in it")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def is_run(self) -> bool:
        return (self.path / self.CONFIG).is_file() and (self.path / self.ENVIRONMENT).is_file()

    @property
    def _old(self) -> Path:
        """Where the run that is being overwritten waits until the new one stands."""
        return self.path.with_name(f".{self.path.name}.old")

    @property
    def _is_empty(self) -> bool:
        return self.path.is_dir() and not any(self.path.iterdir())

    @property
    def _is_stub(self) -> bool:
        """Whether this is all that a start leaves which was killed while the model was loaded: nothing of value."""
        if not self.path.is_dir():
            return False
        written = (self.CONFIG, self.HELD_OUT, self.ENVIRONMENT)
        names = {self.checkpoints.name, self.CONFIG, self.HELD_OUT, *(f".{name}.partial" for name in written)}
        return (
            all(path.name in names for path in self.path.iterdir())
            and self.checkpoints.is_dir()
            and not any(self.checkpoints.iterdir())
        )

    @property
    def _never_trained(self) -> bool:
        """Whether this is a run that ended before its first step, by a fault in a reward, say: nothing of value."""
        later = (self.adapter, self.model, self.path / self.SUMMARY, self.path / self.REPORT)
        if not self.is_run or any(path.exists() for path in later) or not self.checkpoints.is_dir():
            return False
        trained = any(row.get("kind") == "train" for row in _rows(self.path / self.METRICS))
        return not trained and not any(self.checkpoints.iterdir())

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run.

        Raises:
            RunError: no such folder, no run in it, or one written by a newer version.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise RunError(no_run(run.path))
        if not run.is_run:
            raise RunError(f"{run.path} is no run folder: it has no {cls.CONFIG} and {cls.ENVIRONMENT}")
        version = run.environment.get("run_format")
        if version != RUN_FORMAT:
            raise RunError(f"{run.path} has run format {version}, this ft-core reads {RUN_FORMAT}: upgrade ft-core")
        return run

    @property
    def environment(self) -> dict[str, Any]:
        return self._json(self.ENVIRONMENT) or {}

    @property
    def config(self) -> Any:
        """The resolved configuration, validated again (a run may be older than this version)."""
        from ft_core.config import load_config

        try:
            return load_config(self.path / self.CONFIG)
        except ConfigError as error:
            raise RunError(f"the configuration of {self.path} cannot be used: {error}") from error

    def values(self) -> dict[str, Any]:
        """The configuration as plain values, as it stands in the file."""
        loaded = yaml.safe_load((self.path / self.CONFIG).read_text(encoding="utf-8"))
        return loaded if isinstance(loaded, dict) else {}

    def held_out(self) -> list[dict[str, Any]]:
        """The rows kept from training; empty if there are none."""
        path = self.path / self.HELD_OUT
        if not path.is_file():
            return []
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]

    def evaluation(self) -> dict[str, Any] | None:
        return self._json(self.EVALUATION)

    def summary(self) -> dict[str, Any] | None:
        return self._json(self.SUMMARY)

    @property
    def finished(self) -> bool:
        return (self.summary() or {}).get("status") == "finished"

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise RunError(f"{path} cannot be read: it holds no JSON object")
        return value

    # -- claiming a folder for a new run ------------------------------------------------------------------------

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that holds something else, or a run that nobody said what to do with. Changes nothing.

        Raises:
            RunError: one line that says what is there and which options there are.
        """
        if resume and overwrite:
            raise RunError("--resume and --overwrite exclude each other: give one")
        if not self.path.exists() or self._is_empty:
            return
        if not self.path.is_dir():
            raise RunError(f"output {self.path} is a file: give a folder")
        if not self.is_run and not self._is_stub:
            names = ", ".join(sorted(p.name for p in self.path.iterdir())[:3])
            raise RunError(f"output {self.path} holds other files ({names}, …): give an empty or a new folder")
        if self.is_run and not (resume or overwrite or self._never_trained):
            raise RunError(
                f"output {self.path} already holds a run: go on with --resume, or start anew with --overwrite"
            )
        if (
            overwrite and self.is_run and Path.cwd().is_relative_to(self.path.resolve())
        ):  # it would be removed from under our feet
            raise RunError(f"output {self.path} is the folder that you are in: overwrite it from another one")

    def check_same(self, config: Any) -> None:
        """Refuse to resume with another configuration, since the losses would be those of neither run.

        How long to train, what to save and what to keep in memory may change.

        Raises:
            RunError: names the keys that differ.
        """
        from ft_core.config import to_yaml

        mine, theirs = _flat(yaml.safe_load(to_yaml(config))), _flat(self.values())
        how_long = {"training.epochs", "training.max_steps"}
        how_often = {"training.save_every", "training.keep_checkpoints", "training.eval_every"}
        where = {"output", "activations", "memory", "disk"}  # what is recomputed is computed alike
        free = {*where, *how_long, *how_often}
        for values in (mine, theirs):  # these make the same updates
            if values.get("training.optimizer") == "paged_adamw_8bit":
                values["training.optimizer"] = "adamw_8bit"
        differ = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key) and key not in free]
        if differ:
            was = ", ".join(f"{key} was {theirs.get(key)!r} and is {mine.get(key)!r}" for key in differ[:3])
            raise RunError(f"cannot resume {self.path} with another configuration: {was}")

    def recover(self) -> None:
        """Put back the run that a killed start with ``overwrite`` had moved aside and not yet replaced.

        Only whoever holds the folder may call it (:func:`ft_core.training.lock.held`).

        Raises:
            RunError: it cannot be put back.
        """
        nothing_there = not self.path.exists() or self._is_empty or self._is_stub
        if not (self._old.is_dir() and nothing_there):
            return
        try:
            if self.path.exists():
                shutil.rmtree(self.path)
            os.replace(self._old, self.path)
        except OSError as error:
            raise RunError(f"cannot move {self._old} to {self.path}: {error.strerror or error}") from error

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the folder empty for a new run. If the body fails, what was there of value is there again: an old run.

        Raises:
            RunError: the folder cannot be made.
        """
        old, in_place = self._old, self._is_empty or self._is_stub
        try:
            if in_place:  # it may be a mount or the folder that the user is in, which must not be moved
                _remove_content(self.path)
            elif self.path.exists():
                shutil.rmtree(old, ignore_errors=True)  # recover() has put back what was worth it
                os.replace(self.path, old)
            made = _first_missing(self.path)
            self.checkpoints.mkdir(parents=True)
        except OSError as error:
            if old.exists() and not self.path.exists():
                os.replace(old, self.path)
            raise RunError(f"cannot make the run folder {self.path}: {error.strerror or error}") from error
        try:
            yield
        except BaseException:
            if in_place:
                _remove_content(self.path)
            else:
                shutil.rmtree(made if not old.exists() else self.path, ignore_errors=True)
                if old.exists():
                    os.replace(old, self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    # -- metrics ------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``; a line that a crash cut short is passed over."""
        return _rows(self.path / self.METRICS)

    def seconds_until(self, step: int) -> float:
        """How long the run had taken when it reached ``step``."""
        return max((row.get("seconds") or 0.0 for row in self.metrics() if row.get("step", 0) <= step), default=0.0)

    def truncate(self, step: int) -> None:
        """Drop metrics and samples after ``step``, since a run that is resumed there writes them again."""
        for name in (self.METRICS, self.SAMPLES):
            path = self.path / name
            if name == self.SAMPLES and not path.is_file():
                continue  # most methods write none
            kept = [row for row in _rows(path) if row.get("step", 0) <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def runs_in(folder: Path) -> list[Path]:
    """The runs that lie in a folder, the newest first; none where it cannot be read."""
    try:
        found = [(path.stat().st_mtime, path) for path in folder.iterdir() if path.is_dir() and Run(path).is_run]
    except OSError:
        return []
    return [path for _, path in sorted(found, key=lambda one: (-one[0], one[1]))]


def no_run(path: Path, what: str = "run folder") -> str:
    """What to say of a run that is not there: the runs that are, in the folder where it was looked for.

    Args:
        what: that ``path`` may be.
    """
    said, folder = f"no {what} {path}", path.parent
    if not folder.is_dir():
        return f"{said}: there is no folder {folder}"
    if Run(folder).is_run:
        return f"{said}: the run is {folder}"
    shown = folder.resolve() if folder == Path() else folder
    names = [run.name for run in runs_in(folder)]
    if not names:
        return f"{said}: {shown} holds no run; give the folder that ft train wrote (its 'output')"
    close = difflib.get_close_matches(path.name, names, 1)
    hint = f"; did you mean {folder / close[0]}?" if close else ""
    return f"{said}: the runs in {shown} are {some(names)}{hint}"


def _first_missing(path: Path) -> Path:
    """The topmost folder that making ``path`` makes, so that undoing it leaves none of its parents behind."""
    while not path.parent.exists():
        path = path.parent
    return path


def _remove_content(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
