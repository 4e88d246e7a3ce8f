"""A transformers model folder to one GGUF file, tensor by tensor; one that stays as it is in blocks of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import check_complete, read_config
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError, one_line
from ft_export.folders import require_space
from ft_export.gguf.architectures import find_architecture
from ft_export.gguf.growing import Growing
from ft_export.gguf.kernels import quantize
from ft_export.gguf.mixes import FILE_TYPES, WHOLE, Shape, kind_of
from ft_export.gguf.rules import Architecture, Output, plan, same
from ft_export.gguf.streaming import Stream, is_finite, rows_of
from ft_export.gguf.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from ft_export.progress import Progress, counting, silent
from ft_export.runs import Rope

if TYPE_CHECKING:
    import torch

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
    read_vocabulary(tokenizer, config.vocab_size, pre)


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
    vocabulary = read_vocabulary(folder, config.vocab_size, pre)
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    outputs = plan(architecture, config, list(weights))
    named = [(_gguf_name(names, output, folder), output) for output in outputs]
    shape = _shape(config, "output.weight" not in dict(named))
    jobs = [_Job(output, name, weights, config, type, shape, architecture.float32) for name, output in named]
    there = target.stat().st_size if target.is_file() else 0
    require_space(target.parent, sum(job.bytes for job in jobs) + 50_000_000 - there, "the GGUF file")

    # apart from the tensors, since the writer would begin the file anew
    beginning = target.with_name(f".{target.name}.beginning")
    writer = gguf.GGUFWriter(beginning, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(_safe_name(name or folder.absolute().name, vocabulary))
        for method, attribute in architecture.keys:
            getattr(writer, method)(getattr(config, attribute))
        if architecture.extra_keys:
            architecture.extra_keys(writer, config)
        write_vocabulary(writer, vocabulary)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type].code])
        extra = list(architecture.extra_tensors(config)) if architecture.extra_tensors else []
        writes: list[_Job | _Made] = sorted([*jobs, *(_Made(*one) for one in extra)], key=lambda job: _place(job.name))
        for job in writes:
            job.announce(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = beginning.read_bytes()
    finally:
        writer.close()
        beginning.unlink(missing_ok=True)
    written: dict[str, dict[str, Any]] = {}
    if journal is not None and journal.is_file():
        progress(0, 0, "reading what an interrupted conversion has left")
    count = counting(progress, len(writes), "tensors written")
    with Growing(target, head, {job.name: job.bytes for job in writes}, writer.data_alignment, journal) as file:
        for job in writes:
            digest = file.whole.get(job.name) or file.add(job.name, job.stream())
            written[job.name] = {"type": job.type.name, "shape": list(job.shape), "sha256": digest}
            count()
    kinds = {architecture.parameter(source): job.type.name for job in jobs for source in job.output.sources}
    return Converted(target, architecture.name, vocabulary, written, kinds, len(file.whole))


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


class _Made:
    """A tensor that the source does not have, in fp32."""

    def __init__(self, name: str, value: torch.Tensor) -> None:
        import gguf

        self.name, self._value, self.shape = name, value, tuple(value.shape)
        self.type, self.bytes = gguf.GGMLQuantizationType.F32, value.nbytes

    def announce(self, writer: Any) -> None:
        """Say what will be written."""
        writer.add_tensor_info(self.name, self.shape, self._value.numpy().dtype, self._value.nbytes)

    def stream(self) -> Stream:
        """What is written."""
        return Stream([self._value.numpy()], self._value.nbytes)


class _Job:
    """One tensor on its way into the file; its shape is known before it is loaded."""

    def __init__(
        self, output: Output, name: str, weights: Checkpoint, config: Any, type: str, shape: Shape,
        float32: tuple[str, ...],
    ) -> None:  # fmt: skip
        import gguf
        import torch

        self.output, self.name, self.weights, self.config = output, name, weights, config
        meta = [torch.empty(weights.shape(source), device="meta") for source in output.sources]
        self.shape = tuple(output.make(meta, config).shape)
        self.type = gguf.GGMLQuantizationType[kind_of(name, self.shape, type, shape, float32)]
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        self.bytes = _product(self.shape) // block * size

    def announce(self, writer: Any) -> None:
        import gguf
        import numpy as np

        kinds = gguf.GGMLQuantizationType
        if self.type in (kinds.F16, kinds.F32):
            dtype = np.dtype(np.float16 if self.type == kinds.F16 else np.float32)
            writer.add_tensor_info(self.name, self.shape, dtype, self.bytes)
        else:
            shape = gguf.quant_shape_to_byte_shape(self.shape, self.type)
            writer.add_tensor_info(self.name, shape, np.dtype(np.uint8), self.bytes, raw_dtype=self.type)

    def stream(self) -> Stream:
        """What is written."""
        return Stream(map(self._written, self._blocks()), self.bytes)

    def _blocks(self) -> Iterator[torch.Tensor]:
        if self.output.make is same:
            yield from self.weights.blocks(self.output.sources[0])
            return
        tensors = [self.weights.tensor(source) for source in self.output.sources]
        yield from rows_of(self.output.make(tensors, self.config))

    def _written(self, block: torch.Tensor) -> Any:
        import gguf

        kinds = gguf.GGMLQuantizationType
        if self.type == kinds.F16:
            half = block.half()
            if not is_finite(half):
                self._require_finite(block)
                raise ExportError(
                    f"tensor {self.output.name} has values beyond F16's 65504: it cannot be written as f16"
                )
            return half.contiguous().numpy()
        self._require_finite(block)
        value = block.float().contiguous().numpy()
        if self.type == kinds.F32:
            return value
        return gguf.quants.quantize(value, self.type) if self.type.name in WHOLE else quantize(value, self.type.name)

    def _require_finite(self, block: torch.Tensor) -> None:
        if not is_finite(block):
            raise ExportError(f"tensor {self.output.name} holds values that are not finite: the model is broken")


def _gguf_name(names: Any, output: Output, folder: Path) -> str:
    name = names.get_name(output.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ExportError(f"{folder}: llama.cpp has no place for the tensor {output.name} of this architecture")
    return str(name)


def _product(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
