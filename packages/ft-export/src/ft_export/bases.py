"""Finding the base model of an adapter and loading models, from safetensors only and without anyone's code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.folders import check_inside
from ft_export.hearing import speech_end
from ft_export.runs import Rope, read_json
from ft_export.seeing import model_class

if TYPE_CHECKING:
    import torch

__all__ = [
    "DOWNLOADED",
    "TOKENIZER_FILES",
    "attach",
    "check_complete",
    "check_shape",
    "copy_tokenizer",
    "empty_model",
    "find_base",
    "load_model",
    "load_tokenizer",
    "local_base",
    "name_stops",
    "processor_folder",
    "quantization_of",
    "read_config",
    "same_folder",
    "stop_tokens",
    "tokenizer_folder",
]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is read of a model's folder: weights, configurations, tokenizers; no code."""
UNREADABLE = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, ArithmeticError)
"""What transformers raises of files that are not what it takes them for."""
NOT_DOWNLOADED = ("consolidated*", "*/*")  # the same weights in another layout, and what lies in subfolders
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *("vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "normalizer.json"),
    "speech.json",  # ft-speech's: which codec the tokens of sound belong to
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Of these, what the folder of a tokenizer that comes from an adapter does not have is taken from the base."""


def find_base(reference: str) -> Path:
    """The folder of a base model: the folder itself, or a Hub model in the cache, fetched if it is not there.

    Raises:
        ExportError: it is neither a folder nor a Hub name, or cannot be fetched.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ExportError(f"the base model's folder {path} has no config.json; name another with ft merge --base")
        return path
    if not HUB_NAME.fullmatch(reference):
        raise ExportError(f"the base model {reference} is not there; name its folder or Hub name with ft merge --base")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=list(DOWNLOADED), ignore_patterns=list(NOT_DOWNLOADED)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(
            f"the base model {reference} cannot be fetched: {reason}; name its folder with ft merge --base"
        ) from error


def local_base(reference: str) -> Path | None:
    """The folder of a base model as far as it is on this machine: its own, or the Hub's cache. Nothing is fetched."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path if (path / "config.json").is_file() else None
    if not HUB_NAME.fullmatch(reference):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(reference, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return cached if (cached / "config.json").is_file() else None


def quantization_of(folder: Path) -> str | None:
    """How a base says in its own ``config.json`` that it is quantized: a method's name, or None."""
    said = read_json(folder / "config.json").get("quantization_config")
    return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else None


def load_model(
    folder: Path, dtype: torch.dtype, *, labels: int | None = None, rope: Rope | None = None, **options: Any
) -> Any:
    """A transformers model on the CPU, in evaluation mode.

    Args:
        labels: None for a language model; else the outputs of a score head, which may be missing from the files (an
            adapter brings it).
        rope: the rotary scaling to give it in place of its own; the model's configuration has it then.

    Raises:
        ExportError: transformers cannot load it, or the files lack a weight (which would be random).
    """
    import transformers

    kind: Any = model_class(read_config(folder))
    if labels is not None:
        kind, options = transformers.AutoModelForSequenceClassification, {**options, "num_labels": labels}
    try:
        if rope is not None:  # in the configuration, which the rotary embedding reads when it is built
            heads = {"num_labels": options.pop("num_labels")} if labels is not None else {}
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **heads
            )
            rope.put(config)
            options = {**options, "config": config}
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (*UNREADABLE, RuntimeError) as error:
        if "mismatched" in str(error) and labels is None:  # transformers has printed which, and does not say
            stored = Checkpoint(folder)
            check_complete(folder, read_config(folder), {name: stored.shape(name) for name in stored})
        raise ExportError(f"{folder} cannot be loaded: {error}") from error
    except Exception as error:
        if _is_refused_value(error):
            raise ExportError(f"{folder} cannot be loaded: {error}") from error
        if type(error).__name__ != "SafetensorError":
            raise
        raise ExportError(f"{folder} has broken weights: {error}; get them again") from error
    missing = sorted(name for name in info["missing_keys"] if labels is None or not name.startswith("score."))
    if missing:
        raise ExportError(f"{folder} has no weights for {missing[0]} ({len(missing)} missing): it is incomplete")
    return model.eval()


def read_config(folder: Path) -> Any:
    """A folder's transformers configuration.

    Raises:
        ExportError: there is none that transformers loads.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if not isinstance(error, UNREADABLE) and not _is_refused_value(error):
            raise
        raise ExportError(f"{folder} has no configuration that transformers loads: {error}") from error


def _is_refused_value(error: Exception) -> bool:
    """Whether transformers says so of a value in config.json that has another type than it should."""
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, StrictDataclassError)


def attach(model: Any, adapter: Path, rows: int | None = None) -> Any:
    """The adapter on its base, in evaluation mode, of ``rows`` tokens where these became more.

    Raises:
        ExportError: PEFT cannot put it there.
    """
    from peft import PeftModel

    try:
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, adapter, is_trainable=False).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"PEFT cannot attach {adapter} to its base: {error}") from error


def empty_model(folder: Path, config: Any) -> Any:
    """The transformers model of a configuration, without weights.

    Raises:
        ExportError: it is of none that answers texts; names ``folder``.
    """
    import torch

    try:
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=False)
    except (*UNREADABLE, RuntimeError) as error:
        raise ExportError(f"{folder} has a configuration of no language model: {error}") from error


def check_complete(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a folder with those that its configuration asks for; no weight is made for it.

    Args:
        shapes: of the folder's tensors, by name.

    Raises:
        ExportError: one is missing or has another shape; names it.
    """
    from ft_export.merging.names import made_of_others, parameter_names

    model = empty_model(folder, config)
    names = parameter_names(shapes, model)
    there, made = {names[key]: shape for key, shape in shapes.items()}, made_of_others(model)
    for name, parameter in model.named_parameters():
        if name in there:
            check_shape(folder, name, there[name], tuple(parameter.shape))
        elif not made(name):
            raise ExportError(f"{folder} has no weights for {name}, which its config.json asks for: it is incomplete")


def check_shape(folder: Path, name: str, shape: tuple[int, ...], asked: tuple[int, ...]) -> None:
    """
    Raises:
        ExportError: a tensor of the folder has another shape than its configuration asks for.
    """
    if shape != asked:
        mine, its = ("x".join(map(str, sizes)) for sizes in (shape, asked))
        raise ExportError(f"{folder} has {name} as {mine}, its config.json asks for {its}: they do not belong together")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model or adapter folder.

    Raises:
        ExportError: there is none, or transformers cannot load it.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # the tokenizers library has no class of its own for a file that it cannot read
        if not isinstance(error, UNREADABLE) and not _is_refused_value(error) and type(error) is not Exception:
            raise
        raise ExportError(f"{folder} has no tokenizer that transformers loads: {error}") from error


def copy_tokenizer(adapter: Path, base: Path, to: Path) -> Path:
    """Copy the tokenizer's files, the adapter's if it brings any, else the base's, byte for byte; return the source.

    Raises:
        ExportError: neither has a tokenizer.
    """
    import shutil

    source = tokenizer_folder(adapter, base)
    extra = source / "additional_chat_templates"
    for path in [*(source / name for name in TOKENIZER_FILES), *(extra.rglob("*") if extra.is_dir() else ())]:
        if path.is_file():
            check_inside(path, source)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)
    if extra.is_dir():
        shutil.copytree(extra, to / extra.name)
    if source is adapter:
        _copy_processor(base, to)
    if source is adapter and not _has_template(to) and (base / "chat_template.jinja").is_file():
        shutil.copyfile(base / "chat_template.jinja", to / "chat_template.jinja")
    return source


def processor_folder(adapter: Path, base: Path) -> Path:
    """Where the processor of images is that goes with a merged model: with the adapter if it brings one."""
    return adapter if any((adapter / name).is_file() for name in PROCESSOR_FILES[:2]) else base


def _copy_processor(base: Path, to: Path) -> None:
    """Take the base's processor where an adapter brought its tokenizer alone, and what it has for videos.

    Where it brought one, transformers 5 has the images' part inside; a base with that part in a file of its own, which
    other engines read, gets one again, of the adapter's values.
    """
    import shutil

    brought = any((to / name).is_file() for name in PROCESSOR_FILES)
    for name in PROCESSOR_FILES:
        if (base / name).is_file() and not (to / name).is_file() and (not brought or name.startswith("video")):
            check_inside(base / name, base)
            shutil.copyfile(base / name, to / name)
    whole, images = PROCESSOR_FILES[:2]
    if brought and (base / images).is_file() and not (to / images).is_file():
        inner = read_json(to / whole).get("image_processor")
        if isinstance(inner, dict):
            (to / images).write_text(json.dumps(inner, indent=2) + "\n", encoding="utf-8")


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Where the tokenizer is: with the adapter if it brings one, else with the base.

    Raises:
        ExportError: neither has one.
    """
    for source in (adapter, base):
        if (source / "tokenizer_config.json").is_file():
            return source
    raise ExportError(f"neither {adapter} nor {base} has a tokenizer (tokenizer_config.json)")


def stop_tokens(tokenizer: Any, folder: Path) -> list[int]:
    """The ids that end an answer.

    The tokenizer's end-of-sequence token, those that the configurations name, and the one that ends a turn in the chat
    template: a base model's end-of-text token is another one, and a model that was taught conversations never says it.

    Raises:
        ExportError: a configuration names something that is no token.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    found += speech_end(tokenizer)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    rows = max(len(tokenizer), size if isinstance(size, int) else 0)
    for name in ("generation_config.json", "config.json"):
        said = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids = said if isinstance(said, list) else [] if said is None else [said]
        for token in ids:
            if type(token) is not int or token < 0:
                raise ExportError(f"{folder / name} has eos_token_id {said!r} (allowed: token ids)")
        found += [token for token in ids if token < rows]  # no model says what it has no row for
    turn_end = _turn_end(tokenizer)
    found += [] if turn_end is None else [turn_end]
    return list(dict.fromkeys(found))


def name_stops(folder: Path, stops: list[int]) -> list[int]:
    """Let the model's generation configuration name every token that ends an answer; returns those it did not name."""
    path = folder / "generation_config.json"
    said: dict[str, Any] = read_json(path) if path.is_file() else {"_from_model_config": True}
    known = said.get("eos_token_id")
    new = [stop for stop in stops if stop not in ([known] if isinstance(known, int) else known or [])]
    if new:
        said["eos_token_id"] = stops
        path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return new


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after an answer, or None."""
    if not tokenizer.chat_template:
        return None
    answer = "an answer"
    said = (("user", "a question"), ("assistant", answer))
    text = ""
    for as_parts in (False, True):  # templates of models that see may take contents in parts alone
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": words}] if as_parts else words} for role, words in said
        ]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # a template is a program of the model's, its errors have no common type
            continue
        if answer in text:
            break
    if answer not in text:
        return None
    after = tokenizer(text.rpartition(answer)[2].strip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return int(after[0]) if after and after[0] in special else None


def _has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or bool(
        read_json(folder / "tokenizer_config.json").get("chat_template")
    )


def same_folder(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
