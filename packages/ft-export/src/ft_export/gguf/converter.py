"""A transformers model folder to one GGUF file, tensor by tensor: what is held in memory is one tensor."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError, one_line
from ft_export.folders import require_space
from ft_export.gguf.architectures import Output, find_architecture, plan
from ft_export.gguf.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from ft_export.runs import Rope

if TYPE_CHECKING:
    import torch

__all__ = ["TYPES", "Converted", "check_convertible", "convert", "require_gguf"]

TYPES = ("f16", "q8_0")
BLOCK = 32
"""How many neighbouring values of a row share a scale in Q8_0."""


@dataclass(frozen=True)
class Converted:
    """What :func:`convert` wrote.

    Attributes:
        file: the GGUF file.
        architecture: llama.cpp's name of it.
        vocabulary: the tokenizer's keys.
        tensors: by GGUF name: type, shape and SHA-256 of the bytes in the file.
    """

    file: Path
    architecture: str
    vocabulary: Vocabulary
    tensors: dict[str, dict[str, Any]]


def require_gguf() -> None:
    """
    Raises:
        ExportError: the ``gguf`` package is not installed.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ExportError("writing GGUF needs the gguf package: pip install gguf xllamacpp")


def check_convertible(model: Path, tokenizer: Path, pre: str | None = None, rope: Rope | None = None) -> None:
    """Look at a model's configuration and a tokenizer, before anything is computed for the sake of converting them.

    Args:
        model: the base model's folder.
        tokenizer: the folder of the tokenizer.
        pre: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised.
        rope: the rotary scaling that the model will have in place of its own.

    Raises:
        ExportError: the architecture or the tokenizer cannot be written to GGUF.
    """
    require_gguf()
    config = _configuration(model)
    if rope is not None:
        rope.put(config)
    find_architecture(config)
    read_vocabulary(tokenizer, config.vocab_size, pre)


def _configuration(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{folder} has no configuration that transformers loads: {error}") from error


def _safe_name(name: str, vocabulary: Vocabulary) -> str:
    """The name to write: llama.cpp looks up a token of Phi-3's where the name has "phi3" in it, and fails without."""
    if "<|endoftext|>" in vocabulary.tokens:
        return name
    return re.sub(r"(phi)-?(3)", r"\1_\2", name, flags=re.IGNORECASE)


@one_line
def convert(
    model: Path | str, out: Path | str, *, type: str = "f16", pre: str | None = None, name: str | None = None
) -> Converted:
    """Write ``model`` as the GGUF file ``out``. Nothing is checked in an engine; :func:`ft_export.export_gguf` does.

    Matrices are written in ``type``, norms and other one-dimensional tensors in F32, and a matrix whose rows cannot be
    cut into blocks of 32 in F16, as llama.cpp's own converter does.

    Args:
        model: a transformers folder with safetensors weights.
        out: the file to write; it is overwritten. Written in place: the caller renames.
        type: ``f16`` or ``q8_0``.
        pre: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised.
        name: the model's name in the file; the folder's by default.

    Raises:
        ExportError: an unknown architecture, tensor or tokenizer, broken weights, a value out of F16's range, or no
            space.
    """
    require_gguf()
    import gguf

    folder, target = Path(model), Path(out)
    if type not in TYPES:
        raise ExportError(f"--type {type!r} is not known for gguf (allowed: {', '.join(TYPES)})")
    config = _configuration(folder)
    architecture = find_architecture(config)
    weights = Checkpoint(folder)
    vocabulary = read_vocabulary(folder, config.vocab_size, pre)
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    outputs = plan(architecture, config, list(weights))
    jobs = [
        _Job(output, _gguf_name(names, output, folder), weights, config, type, architecture.float32)
        for output in outputs
    ]
    require_space(target.parent, sum(job.bytes for job in jobs) + 50_000_000, "the GGUF file")

    writer = gguf.GGUFWriter(target, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(_safe_name(name or folder.absolute().name, vocabulary))
        for method, attribute in architecture.keys:
            getattr(writer, method)(getattr(config, attribute))
        if architecture.extra_keys:
            architecture.extra_keys(writer, config)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if type == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_vocabulary(writer, vocabulary)
        extra = dict(architecture.extra_tensors(config)) if architecture.extra_tensors else {}
        for key, tensor in extra.items():
            writer.add_tensor_info(key, tuple(tensor.shape), tensor.numpy().dtype, tensor.numpy().nbytes)
        for job in jobs:
            job.announce(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written: dict[str, dict[str, Any]] = {}
        for key, tensor in extra.items():
            writer.write_tensor_data(tensor.numpy())
            written[key] = _described(tensor.numpy(), gguf.GGMLQuantizationType.F32, tuple(tensor.shape))
        for job in jobs:
            array = job.array()
            writer.write_tensor_data(array)
            written[job.name] = _described(array, job.type, job.shape)
    finally:
        writer.close()
    return Converted(target, architecture.name, vocabulary, written)


class _Job:
    """One tensor on its way into the file; its shape is known before it is loaded."""

    def __init__(
        self, output: Output, name: str, weights: Checkpoint, config: Any, type: str, float32: tuple[str, ...]
    ) -> None:
        import gguf
        import torch

        self.output, self.name, self.weights, self.config = output, name, weights, config
        meta = [torch.empty(weights.shape(source), device="meta") for source in output.sources]
        self.shape = tuple(output.make(meta, config).shape)
        kinds = gguf.GGMLQuantizationType
        if len(self.shape) < 2 or name.endswith(("_norm.weight", *float32)):
            self.type = kinds.F32
        elif type == "q8_0" and self.shape[-1] % BLOCK == 0:
            self.type = kinds.Q8_0
        else:
            self.type = kinds.F16
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        self.bytes = _product(self.shape) // block * size

    def announce(self, writer: Any) -> None:
        import gguf
        import numpy as np

        shape: tuple[int, ...] = self.shape
        if self.type == gguf.GGMLQuantizationType.Q8_0:
            shape = gguf.quant_shape_to_byte_shape(shape, self.type)
            writer.add_tensor_info(self.name, shape, np.dtype(np.uint8), self.bytes, raw_dtype=self.type)
        else:
            half = self.type == gguf.GGMLQuantizationType.F16
            writer.add_tensor_info(self.name, shape, np.dtype(np.float16 if half else np.float32), self.bytes)

    def array(self) -> Any:
        import gguf
        import torch

        tensors = [self.weights.tensor(source) for source in self.output.sources]
        value: torch.Tensor = self.output.make(tensors, self.config).float().contiguous()
        if not bool(torch.isfinite(value).all()):
            raise ExportError(f"tensor {self.output.name} holds values that are not finite: the model is broken")
        if self.type == gguf.GGMLQuantizationType.F16:
            half = value.half()
            if not bool(torch.isfinite(half).all()):
                raise ExportError(
                    f"tensor {self.output.name} has values beyond F16's 65504: it cannot be written as f16"
                )
            return half.numpy()
        if self.type == gguf.GGMLQuantizationType.F32:
            return value.numpy()
        return gguf.quants.quantize(value.numpy(), self.type)


def _gguf_name(names: Any, output: Output, folder: Path) -> str:
    name = names.get_name(output.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ExportError(f"{folder}: llama.cpp has no place for the tensor {output.name} of this architecture")
    return str(name)


def _described(array: Any, kind: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"type": kind.name, "shape": list(shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()}


def _product(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
