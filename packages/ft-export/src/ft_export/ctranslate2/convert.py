"""A transformers folder of a Whisper to CTranslate2's, by CTranslate2's own converter."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer, read_config
from ft_export.errors import ExportError
from ft_export.hearing import WHISPER, name_features, speech_family
from ft_export.runs import read_json

__all__ = ["QUANTIZATIONS", "TYPES", "check_convertible", "convert", "require_ctranslate2"]

QUANTIZATIONS = {"float16": "float16", "float32": "float32", "int8": "int8_float32"}
"""By ``--type``, what CTranslate2 calls it: in 8 bits the rest, norms and biases, stays exact."""
TYPES = tuple(QUANTIZATIONS)
LANGUAGE = re.compile(r"<\|[a-z]{2,3}\|>")
"""A token that names a language."""
FEATURES, WORDS = "preprocessor_config.json", "tokenizer.json"


def require_ctranslate2() -> None:
    """
    Raises:
        ExportError: CTranslate2 is not installed.
    """
    if find_spec("ctranslate2") is None:
        raise ExportError("writing for CTranslate2 needs it, and so does the proof: pip install ctranslate2")


def check_convertible(folder: Path) -> Any:
    """A folder's configuration, of a Whisper as CTranslate2 computes one.

    Raises:
        ExportError: it is of another model, or of a Whisper with what CTranslate2's has not.
    """
    config = read_config(folder)
    if speech_family(config) != WHISPER:
        raise ExportError(
            f"{folder} is a {config.model_type}, and only Whisper is exported to ctranslate2: use gguf, vllm or hub"
        )
    if config.activation_function != "gelu":
        raise ExportError(
            f"{folder} has activation_function {config.activation_function!r}, CTranslate2's Whisper has gelu"
        )
    if config.scale_embedding:
        raise ExportError(f"{folder} has scale_embedding: true, which CTranslate2's Whisper has not")
    return config


def convert(model: Path, to: Path, type: str) -> list[str]:
    """Write CTranslate2's files of ``model`` into the folder ``to``, and those that faster-whisper reads beside them.

    Args:
        model: a transformers folder. type: one of :data:`TYPES`.

    Returns:
        What is to be known, for people.

    Raises:
        ExportError: CTranslate2's converter does not take it, or a file of the tokenizer or features is missing.
    """
    made = to / "made"  # the converter wants a folder of its own
    try:
        _converter(model).convert(str(made), quantization=QUANTIZATIONS[type], force=True)
    except (ValueError, RuntimeError, NotImplementedError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"CTranslate2's converter does not take {model}: {reason}") from error
    for path in sorted(made.iterdir()):
        os.replace(path, to / path.name)
    made.rmdir()
    for name in (WORDS, FEATURES, "processor_config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, to / name)
    name_features(to)
    (to / "processor_config.json").unlink(missing_ok=True)
    if not (to / WORDS).is_file():
        tokenizer = load_tokenizer(model)
        tokenizer.backend_tokenizer.save(str(to / WORDS))
    if not (to / FEATURES).is_file():
        raise ExportError(f"{model} says nothing of its features (no {FEATURES} nor processor_config.json)")
    return _complete_config(model, to / "config.json")


def _converter(model: Path) -> Any:
    """CTranslate2's converter, which loads safetensors of this folder alone and runs nobody's code."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            return model_class.from_pretrained(
                model_name_or_path,
                **{**options, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False},
            )

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Any:
            return load_tokenizer(Path(model_name_or_path))

    return Converter(str(model.resolve()))


def _complete_config(model: Path, path: Path) -> list[str]:
    """What CTranslate2 reads of a model in ``config.json``, where the converter finds it in one place only."""
    said, lines = read_json(path), []
    generation = read_json(model / "generation_config.json") if (model / "generation_config.json").is_file() else {}
    tokenizer = load_tokenizer(model)
    known = generation.get("lang_to_id")
    languages = known.values() if isinstance(known, dict) else _languages(tokenizer)
    said["lang_ids"] = sorted(int(token) for token in languages)
    for key, name in (("suppress_ids", "suppress_tokens"), ("suppress_ids_begin", "begin_suppress_tokens")):
        said[key] = list(generation.get(name) or [])
    if not generation.get("alignment_heads"):
        lines.append(
            "generation_config.json names no alignment_heads: times of words are taken from all heads of the later half"
        )
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return lines


def _languages(tokenizer: Any) -> list[int]:
    return [index for token, index in tokenizer.get_vocab().items() if LANGUAGE.fullmatch(token)]
