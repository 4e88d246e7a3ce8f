"""The model card: metadata that the Hub reads, and text that says only what the run's own files bear out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from ft_export import __version__
from ft_export.errors import ExportError
from ft_export.hub.licence import Licence
from ft_export.hub.record import Record
from ft_export.hub.usage import usage
from ft_export.hub.wanted import Wanted

__all__ = ["CARD", "Subject", "write_card"]

CARD = "README.md"
LATER = (
    "model",
    "method",
    "data",
    "eval_data",
    "output",
    "lora",
    "training",
    "activations",
    "memory",
    "disk",
    "verify",
)
"""Keys of a configuration that the table of settings leaves out: named elsewhere, paths, or of the machine."""
COUNTS = {
    "train_rows": "rows trained on",
    "held_out_rows": "rows kept from training",
    "train_tokens": "tokens in the rows trained on",
    "trained_tokens": "of them counted in the loss",
}
DONE = {
    "steps": "optimizer steps",
    "tokens": "tokens seen",
    "trainable_parameters": "trained parameters",
    "parameters": "parameters in all",
}


@dataclass(frozen=True)
class Subject:
    """What the card is about.

    Attributes:
        wanted: where it goes, and as what.
        task: the Hub's name of what it does, such as ``text-generation``, or None.
        template: whether it has a chat template.
        tokenizer: the repository with its tokenizer, or None: this one, or its base's.
        trained: whether it was fine-tuned here rather than taken as it is.
        file: the GGUF file's name, or None.
        tags: further words to find it by.
        proof: what was checked, a line each.
        projector: the name of the GGUF file of the tower and projector of a model that sees, or None.
    """

    wanted: Wanted
    task: str | None
    template: bool
    tokenizer: str | None
    trained: bool
    file: str | None
    tags: Sequence[str]
    proof: Sequence[str]
    projector: str | None = None


def write_card(folder: Path, about: Subject, record: Record, licence: Licence, sets: Sequence[str]) -> Path:
    """Write ``README.md`` and read it back with huggingface_hub's own class.

    Args:
        sets: the data sets that are on the Hub.

    Raises:
        ExportError: the metadata is not what was meant once it is read back.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=record.base,
        datasets=list(sets) or None,
        library_name=_library(about.wanted),
        license=licence.id,
        license_name=licence.name if licence.id == "other" else None,
        license_link=licence.link if licence.id == "other" else None,
        pipeline_tag=about.task,
        tags=list(about.tags),
        **({"base_model_relation": _relation(about)} if record.base is not None else {}),
    )
    path = folder / CARD
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{_text(about, record, licence)}", encoding="utf-8")
    try:
        read = ModelCard.load(path)
    except ValueError as error:
        raise ExportError(f"the model card cannot be read back: {error}") from error
    if read.data.to_dict() != data.to_dict():
        raise ExportError(f"the model card reads back as {read.data.to_dict()}, not as {data.to_dict()}")
    return path


def _library(wanted: Wanted) -> str:
    return "gguf" if wanted.is_gguf else "peft" if wanted.type == "adapter" else "transformers"


def _relation(about: Subject) -> str:
    """How it comes from its base. A fine-tuned model in GGUF is no quantized form of its base: it has other weights."""
    if about.wanted.type == "adapter":
        return "adapter"
    return "quantized" if about.wanted.is_gguf and not about.trained else "finetune"


def _text(about: Subject, record: Record, licence: Licence) -> str:
    parts = [f"# {about.wanted.repo.partition('/')[2]}", _intro(about, record)]
    parts += ["## Use", usage(about.wanted, about.task, about.template, about.tokenizer, about.file, about.projector)]
    parts += _section("## Data", _data(record))
    parts += _section("## Training", _training(record))
    parts += _section("## Evaluation", _evaluation(record))
    parts += ["## What was checked", "\n".join(f"- {line}" for line in about.proof)]
    parts += ["## Licence", licence.sentence]
    parts += ["## Made with", ", ".join(_versions(record))]
    return "\n\n".join(parts) + "\n"


def _section(title: str, text: str) -> list[str]:
    return [title, text] if text else []


def _intro(about: Subject, record: Record) -> str:
    base = f"[{record.base}](https://huggingface.co/{record.base})" if record.base else None
    wanted = about.wanted
    what = (
        "A LoRA adapter"
        if wanted.type == "adapter"
        else f"A GGUF file of type {wanted.type.upper()}"
        if wanted.is_gguf
        else "A transformers model"
    )
    if not about.trained:
        return f"{what}, made from {base}." if base else f"{what}."
    how = "trained for" if wanted.type == "adapter" else "fine-tuned from"
    method = record.config.get("method")
    by = f" by {_code(method)}" if isinstance(method, str) else ""
    return f"{what}, {how} {base}{by}." if base else f"{what}, fine-tuned{by}."


def _data(record: Record) -> str:
    lines = [f"Trained on {', '.join(_code(name) for name in record.data)}."] if record.data else []
    said = record.summary.get("data")
    counts = _counted(said if isinstance(said, Mapping) else {}, COUNTS)
    return "\n\n".join([*lines, *([_table(("", ""), counts)] if counts else [])])


def _training(record: Record) -> str:
    rows = _counted(record.summary, DONE)
    config = record.config
    method = config.get("method")
    rows += _settings({key: value for key, value in config.items() if key not in LATER and key != method}, "")
    for section in dict.fromkeys(("lora", "training", method)):
        said = config.get(section) if isinstance(section, str) else None
        if isinstance(said, Mapping):
            rows += _settings(said, f"{section}.")
    dtype = record.environment.get("dtype")
    if isinstance(dtype, str):
        rows.append(("computed in", _code(dtype)))
    return _table(("setting", "value"), rows) if rows else ""


def _evaluation(record: Record) -> str:
    metrics = record.evaluation.get("metrics")
    rows = []
    for name, said in (metrics if isinstance(metrics, Mapping) else {}).items():
        if isinstance(said, Mapping):
            before, after = _number(said.get("before")), _number(said.get("after"))
            if before is not None or after is not None:
                rows.append((_plain(str(name).replace("_", " ")), before or "", after or ""))
    if not rows:
        return ""
    measured, source = record.evaluation.get("rows"), record.evaluation.get("data")
    where = f"On {measured:,} rows" if isinstance(measured, int) else "On rows"
    of = f" of {_code(PureWindowsPath(source).name)}" if isinstance(source, str) and source else ""
    answers = record.evaluation.get("answers")
    some = (
        isinstance(answers, int) and answers != measured and isinstance(metrics, Mapping) and "exact_match" in metrics
    )
    only = f" Exact match was measured on {answers:,} of them." if some else ""
    first = f"{where}{of}, before and after training.{only}"
    return f"{first}\n\n{_table(('metric', 'before', 'after'), rows)}"


def _versions(record: Record) -> list[str]:
    found = [("ft-core", record.environment.get("ft_core")), ("ft-export", __version__)]
    libraries = record.environment.get("libraries")
    found.append(("torch", record.environment.get("torch")))
    found += list(libraries.items()) if isinstance(libraries, Mapping) else []
    return [f"{_plain(str(name))} {_plain(version)}" for name, version in found if isinstance(version, str) and version]


def _counted(said: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, ...]]:
    return [
        (name, f"{said[key]:,}")
        for key, name in names.items()
        if isinstance(said.get(key), int) and not isinstance(said[key], bool)
    ]


def _settings(said: Mapping[str, Any], prefix: str) -> list[tuple[str, ...]]:
    """Numbers, switches and plain words; never a path."""
    rows: list[tuple[str, ...]] = []
    for key, value in said.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(_is_word(entry) for entry in value):
            rows.append((f"{_code(f'{prefix}{key}')}", _code(", ".join(str(entry) for entry in value))))
        elif value is not None and _is_word(value):
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            rows.append((f"{_code(f'{prefix}{key}')}", _code(shown)))
    return rows


def _is_word(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value) and len(value) <= 80 and PurePath(value).name == value and "\\" not in value
    return isinstance(value, bool | int | float)


def _number(value: Any) -> str | None:
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', '').split())}`"


def _plain(text: str) -> str:
    """Text that Markdown and HTML take as it is."""
    return re.sub(r"([<>*_`\[\]|\\])", r"\\\1", " ".join(text.split()))
