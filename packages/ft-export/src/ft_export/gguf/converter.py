"""A transformers model folder to one GGUF file, tensor by tensor; one that stays as it is in blocks of its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import check_complete, empty_model, read_config
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError, one_line
from ft_export.folders import require_space
from ft_export.gguf.architectures import find_architecture
from ft_export.gguf.jobs import Job, Made, write_file
from ft_export.gguf.mixes import FILE_TYPES, WHOLE, Shape, kind_of
from ft_export.gguf.rules import Architecture, Output, plan
from ft_export.gguf.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from ft_export.merging.names import parameter_names
from ft_export.progress import Progress, silent
from ft_export.runs import Rope
from ft_export.seeing import text_config

__all__ = ["TYPES", "Converted", "check_convertible", "check_type", "convert", "require_gguf"]

TYPES = tuple(FILE_TYPES)
"""What ``--type`` may be, the default first."""


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` wrote.

    Attributes:
        file: the GGUF file.
        architecture: llama.cpp's name of it.
        vocabulary: the tokenizer's keys.
        tensors: by GGUF name: type, shape and SHA-256 of the bytes in the file.
        kinds: by the name of the parameter in transformers' model: the type in the file.
        whole: how many tensors an interrupted conversion had left, and were not made anew.
    """

    file: Path
    architecture: str
    vocabulary: Vocabulary
    tensors: dict[str, dict[str, Any]]
    kinds: dict[str, str]
    whole: int = 0


def require_gguf() -> None:
    """
    Raises:
        ExportError: the ``gguf`` package is not installed.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ExportError("writing GGUF needs the gguf package: pip install gguf xllamacpp")


def check_convertible(
    model: Path, tokenizer: Path, pre: str | None = None, rope: Rope | None = None, type: str = "f16"
) -> None:
    """Look at a model's configuration and a tokenizer, before anything is computed for the sake of converting them.

    Args:
        model: the base model's folder.
        tokenizer: the folder of the tokenizer.
        pre: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised.
        rope: the rotary scaling that the model will have in place of its own.
        type: of the file.

    Raises:
        ExportError: the architecture or the tokenizer cannot be written to GGUF, or the architecture not in this type.
    """
    require_gguf()
    config = read_config(model)
    if rope is not None:
        rope.put(config)
    _check_mixes(find_architecture(config), type)
    read_vocabulary(tokenizer, text_config(config).vocab_size, pre)


def _check_mixes(architecture: Architecture, type: str) -> None:
    plain = [name for name, kind in FILE_TYPES.items() if kind.kind in (*WHOLE, "Q8_0")]
    if type not in plain and not architecture.has_mixes:
        raise ExportError(f"--type {type} is not known for {architecture.name} (allowed: {', '.join(plain)})")


PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
"""Tokens that llama.cpp looks up in a model whose name has "phi3" in it, and fails without."""


def _safe_name(name: str, vocabulary: Vocabulary) -> str:
    """The name to write.

    By "phi3" or "phi-3" in it, and by nothing else, llama.cpp knows that special tokens take the spaces after them.
    """
    is_said = re.search(r"phi-?3", name, flags=re.IGNORECASE)
    if vocabulary.strips and set(vocabulary.tokens) >= PHI3_TOKENS:
        return name if is_said else f"{name} (Phi-3)"
    return re.sub(r"(phi)-?(3)", r"\1_\2", name, flags=re.IGNORECASE)


@one_line
def convert(
    model: Path | str, out: Path | str, *, type: str = "f16", pre: str | None = None, name: str | None = None,
    journal: Path | None = None, progress: Progress = silent,
) -> Converted:  # fmt: skip
    """Write ``model`` as the GGUF file ``out``. Nothing is checked in an engine; :func:`ft_export.export_gguf` does.

    Matrices are written in ``type``, some in another where it is a mix (:mod:`ft_export.gguf.mixes`), norms and other
    one-dimensional tensors in F32. The order of tensors and keys is that of llama.cpp's quantizing tool, so that the
    file is the one that it would write.

    Args:
        model: a transformers folder with safetensors weights.
        out: the file to write; it is overwritten. Written in place: the caller renames.
        type: one of :data:`TYPES`.
        pre: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised.
        name: the model's name in the file; the folder's by default.
        journal: a file beside ``out`` to keep account of whole tensors in; where there is one already, of the same
            model, the conversion goes on after the last of them (:mod:`ft_export.gguf.growing`).
        progress: see :data:`ft_export.progress.Progress`; a part is a tensor.

    Raises:
        ExportError: an unknown architecture, tensor or tokenizer, broken weights, a value out of F16's range, or no
            space.
    """
    require_gguf()
    import gguf

    folder, target = Path(model), Path(out)
    check_type(type)
    config = read_config(folder)
    architecture = find_architecture(config)
    _check_mixes(architecture, type)
    weights = Checkpoint(folder)
    check_complete(folder, config, {name: weights.shape(name) for name in weights})
    text = text_config(config)
    if text is not config:  # names as the model has them: files of models that see have several older ones
        weights.rename(parameter_names(weights, empty_model(folder, config)))
    vocabulary = read_vocabulary(folder, text.vocab_size, pre)
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)

    outputs = plan(architecture, text, list(weights))
    named = [(_gguf_name(names, output, folder), output) for output in outputs]
    shape = _shape(text, "output.weight" not in dict(named))

    def kind(name: str, dimensions: tuple[int, ...]) -> str:
        return kind_of(name, dimensions, type, shape, architecture.float32)

    jobs = [Job(output, name, weights, text, kind) for name, output in named]

    there = target.stat().st_size if target.is_file() else 0
    require_space(target.parent, sum(job.bytes for job in jobs) + 50_000_000 - there, "the GGUF file")

    def write_keys(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(_safe_name(name or folder.absolute().name, vocabulary))
        for method, attribute in architecture.keys:
            getattr(writer, method)(getattr(text, attribute))
        if architecture.extra_keys:
            architecture.extra_keys(writer, text)
        write_vocabulary(writer, vocabulary)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type].code])

    extra = list(architecture.extra_tensors(text)) if architecture.extra_tensors else []
    writes: list[Job | Made] = sorted([*jobs, *(Made(*one) for one in extra)], key=lambda job: _place(job.name))
    written, whole = write_file(target, architecture.name, writes, write_keys, journal, progress)
    kinds = {architecture.parameter(source): job.type.name for job in jobs for source in job.output.sources}
    return Converted(target, architecture.name, vocabulary, written, kinds, whole)


def check_type(type: str) -> None:
    """
    Raises:
        ExportError: no such type.
    """
    if type not in TYPES:
        raise ExportError(f"--type {type!r} is not known for gguf (allowed: {', '.join(TYPES)})")


def _shape(config: Any, tied: bool) -> Shape:
    heads, keys = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    layers = config.num_hidden_layers
    # By the layers alone, as llama.cpp guesses sizes; of 80 with a head of keys for each of queries it says 65B.
    is_70b = layers == 80 and (config.model_type == "qwen2" or (config.model_type == "llama" and heads != keys))
    return Shape(layers, heads // keys, tied, is_70b)


def _place(name: str) -> tuple[int, str]:
    """Where a tensor lies in the file: by layer, what belongs to none first."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1), name


def _gguf_name(names: Any, output: Output, folder: Path) -> str:
    name = names.get_name(output.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ExportError(f"{folder}: llama.cpp has no place for the tensor {output.name} of this architecture")
    return str(name)
