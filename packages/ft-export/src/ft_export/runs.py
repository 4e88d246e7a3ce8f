"""What there is to merge or export: a run folder (docs/run-folder.md), a PEFT adapter, or a transformers model."""

from __future__ import annotations

import difflib
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError

__all__ = ["RUN_FORMAT", "Rope", "Source", "open_source", "read_json"]

RUN_FORMAT = 1
"""The newest version of the run folder's layout that this package reads."""
TASKS = ("text", "vision", "stt", "tts")
"""What runs are merged and exported of (``task`` in their configuration)."""
NAMED = 5
"""Runs that a message names at most."""
LOFTQ, LOFTQ_FORMAT = "loftq.json", 1
"""The file in an adapter's folder that says that it began as what quantization lost; the newest version read here."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Rope:
    """The rotary scaling that a run gave its base model; an adapter's own files have no place for it.

    Attributes:
        max_position_embeddings, rope_parameters: what they are in the base's configuration, in transformers' terms.
    """

    max_position_embeddings: int
    rope_parameters: dict[str, Any]

    def put(self, config: Any) -> None:
        """Set both in a transformers configuration."""
        text = config.get_text_config()
        text.max_position_embeddings = self.max_position_embeddings
        original = self.rope_parameters.get("original_max_position_embeddings")
        if original is not None and hasattr(text, "original_max_position_embeddings"):
            text.original_max_position_embeddings = original  # Phi-3's, which goes before the one in the parameters
        text.rope_parameters = dict(self.rope_parameters)


@dataclass(frozen=True)
class Source:
    """A trained model, wherever it came from.

    Attributes:
        path: the folder that was named.
        name: what to call the model in file names and to people.
        is_run: whether ``path`` is a run folder.
        adapter: the folder of its PEFT adapter, or None.
        model: the folder of its whole transformers model, or None.
        base: the base model's folder or Hub name that the run recorded, or None.
        quantization: how the base was held while training: ``none``, ``nf4`` or ``int8``.
        held_out: the file of held-out rows, or None.
        dtype: the format that the run computed in, or None.
        on_quantized: whether the adapter began as what the base's quantization lost (LoftQ), so that it belongs to the
            quantized base alone.
        rope: the rotary scaling that the base was trained with, where that is not its own.
        task: of the run, ``text`` where it does not say.
    """

    path: Path
    name: str
    is_run: bool = False
    adapter: Path | None = None
    model: Path | None = None
    base: str | None = None
    quantization: str = "none"
    held_out: Path | None = None
    dtype: str | None = None
    on_quantized: bool = False
    rope: Rope | None = None
    task: str = "text"


def open_source(path: Path) -> Source:
    """Find out what ``path`` is.

    Raises:
        ExportError: it does not exist, is a run folder of a newer format or without a trained model, is none of the
            three, or what its adapter belongs to cannot be told.
    """
    path = path.expanduser()
    name = path.absolute().name
    if not path.is_dir():
        raise ExportError(
            f"{path} is not a folder{_runs_beside(path)}: name a run folder, a PEFT adapter folder or a model folder"
        )
    if (path / "environment.json").is_file():
        return _open_run(path, name)
    if (path / "adapter_config.json").is_file():
        return _open_adapter(path, name)
    if (path / "config.json").is_file():
        return Source(path, name, model=path)
    raise ExportError(
        f"{path} holds no environment.json (a run), adapter_config.json (a PEFT adapter) or config.json (a model)"
    )


def _runs_beside(path: Path) -> str:
    """The runs in the folder where a run was looked for, the likeliest first, for a message about its absence."""
    folder = path.parent
    try:
        names = sorted(run.name for run in folder.iterdir() if (run / "environment.json").is_file())
    except OSError:
        names = []
    if not names:
        return ""
    close = difflib.get_close_matches(path.name, names, NAMED)
    names = [*close, *(name for name in names if name not in close)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" (the runs in {folder.resolve() if folder == Path() else folder} are {', '.join(names[:NAMED])}{more})"


def _open_adapter(path: Path, name: str) -> Source:
    """An adapter's folder; of one that lies in its run, what it belongs to is asked of the run too."""
    run, began = path.absolute().parent, _began_in(path)
    in_run = path.absolute().name == "adapter" and (run / "environment.json").is_file()
    whole = _open_run(run, run.name) if in_run else None
    if began is None and whole is not None and whole.on_quantized:
        began = whole.quantization, whole.dtype
    source = Source(path, name, adapter=path)
    if whole is not None:
        source = replace(source, rope=whole.rope, task=whole.task)
    return source if began is None else replace(source, quantization=began[0], dtype=began[1], on_quantized=True)


def _began_in(adapter: Path) -> tuple[str, str | None] | None:
    """The quantization that an adapter began in (LoftQ), and the format of the weights before it, as ft left them."""
    if not (adapter / LOFTQ).is_file():
        return None
    said = read_json(adapter / LOFTQ)
    version, quantization, dtype = (said.get(key) for key in ("loftq_format", "quantization", "dtype"))
    if not isinstance(version, int) or not 1 <= version <= LOFTQ_FORMAT:
        raise ExportError(
            f"{adapter / LOFTQ} has loftq_format {version!r}, this ft-export reads up to {LOFTQ_FORMAT}: "
            "upgrade ft-export"
        )
    if quantization != "nf4" or dtype not in DTYPES:
        raise ExportError(
            f"{adapter / LOFTQ} has quantization {quantization!r} and dtype {dtype!r} "
            f"(allowed: nf4; {', '.join(DTYPES)})"
        )
    return quantization, dtype


def _open_run(path: Path, name: str) -> Source:
    import yaml

    environment = read_json(path / "environment.json")
    version = environment.get("run_format")
    if not isinstance(version, int) or not 1 <= version <= RUN_FORMAT:
        raise ExportError(
            f"{path} has run_format {version!r}, this ft-export reads up to {RUN_FORMAT}: upgrade ft-export"
        )
    config: Any = {}
    if (path / "config.yaml").is_file():
        try:
            config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ExportError(f"{path / 'config.yaml'} is not YAML: {error}") from error
    config = config if isinstance(config, dict) else {}
    if (task := config.get("task", "text")) not in TASKS:
        raise ExportError(
            f"{path} was trained with task: {task}, which is not exported here (allowed: {', '.join(TASKS)}); "
            "transformers and PEFT load its adapter and merge it (merge_and_unload)"
        )
    quantization, lora, dtype = config.get("quantization"), config.get("lora"), environment.get("dtype")
    base = environment.get("base_model")
    adapter = path / "adapter" if (path / "adapter" / "adapter_config.json").is_file() else None
    model = path / "model" if (path / "model" / "config.json").is_file() else None
    if adapter is None and model is None:
        raise ExportError(
            f"{path} has neither adapter/ nor model/: the run has not finished; go on with "
            + shlex.join(["ft", "train", f"{path}/config.yaml", "--resume"])
        )
    held_out = path / "held_out.jsonl"
    return Source(
        path,
        name,
        is_run=True,
        adapter=adapter,
        model=None if adapter else model,
        base=base.get("path") if isinstance(base, dict) else None,
        quantization=quantization if isinstance(quantization, str) else "none",
        held_out=held_out if held_out.is_file() else None,
        dtype=dtype if isinstance(dtype, str) else None,
        rope=_rope(path, base, config) if adapter else None,
        task=task,
        on_quantized=isinstance(lora, dict) and lora.get("init_lora_weights") == "loftq" and quantization == "nf4",
    )


def _rope(path: Path, base: Any, config: dict[str, Any]) -> Rope | None:
    said = base if isinstance(base, dict) else {}
    most, parameters = said.get("max_position_embeddings"), said.get("rope_parameters")
    if isinstance(most, int) and isinstance(parameters, dict):
        return Rope(most, parameters)
    if config.get("rope_scaling"):
        raise ExportError(
            f"{path} was trained with rope_scaling, but its environment.json has no base_model.rope_parameters: "
            "what its base was cannot be told"
        )
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ExportError: the file is missing, is not JSON, or holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds no JSON object")
    return value
