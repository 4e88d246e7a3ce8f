"""GGUF files that another converter has written: read as if ours had, and written once more as we would.

What the tokenizer does (the token and the space that it puts before a text, all tokens that end an answer) is written
as ours writes it: llama.cpp's converter leaves some of that to what llama.cpp takes for granted. Which type a tensor
gets is the table of :mod:`ft_export.gguf.mixes`, by the tensor's name; that table is llama.cpp's for models without
experts. Matrices that it does not name stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import load_tokenizer, stop_tokens
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.gguf.converter import Converted
from ft_export.gguf.kernels import quantize
from ft_export.gguf.mixes import FILE_TYPES, WHOLE, Shape, kind_of
from ft_export.gguf.pieces import prefix_of
from ft_export.gguf.streaming import BLOCK, Stream
from ft_export.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

__all__ = ["check_rounded", "read_foreign", "rewrite"]

ROUNDED = re.compile(r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)))\.weight")
"""The matrices that the table of mixes names."""
FILE_TYPE, VERSION = "general.file_type", "general.quantization_version"
STOPS = ("eos", "eot", "eom")
"""The roles of tokens at which llama.cpp ends an answer."""
DOINGS = ("add_bos_token", "add_eos_token", "add_space_prefix", *(f"{role}_token_id" for role in STOPS))
"""Keys that say what the tokenizer does."""


def read_foreign(file: Path, model: Path, type: str, by: str) -> Converted:
    """What a file holds, in our own converter's terms.

    Args:
        file: a GGUF file. model: the transformers folder that it was made from.
        type: of the file. by: who has written it, for messages.

    Raises:
        ExportError: it is no whole GGUF file of a model.
    """
    reader = _reader(file, by)
    written: dict[str, dict[str, Any]] = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        written[tensor.name] = {"type": tensor.tensor_type.name, "shape": shape, "sha256": _digest(tensor.data)}
    architecture = str(_value(reader, "general.architecture"))
    return Converted(file, architecture, _vocabulary(reader, model), written, _kinds(reader, model, type))


def _reader(file: Path, by: str) -> Any:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # gguf has no class of its own for a file that it cannot read
        raise ExportError(f"{by} has written what is no whole GGUF file: {error}") from error
    if not reader.tensors or _value(reader, "general.architecture") is None:
        raise ExportError(f"{by} has written a GGUF file without a model")
    return reader


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _digest(data: Any) -> str:
    return hashlib.sha256(memoryview(data).cast("B")).hexdigest()


def _vocabulary(reader: Any, model: Path) -> Vocabulary:
    """What :func:`rewrite` writes of it, and what the checks ask for; the tokens themselves are the file's."""
    tokenizer = load_tokenizer(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    prefix = prefix_of(json.loads(backend.to_str())) if backend is not None else None
    has_scores = _value(reader, "tokenizer.ggml.model") == "llama"
    how, even_before_space = prefix if has_scores and prefix is not None else ("never", True)
    before = how == "always" or (how == "start" and not tokenizer.chat_template)  # as in ft_export.gguf.vocabulary
    bare, dressed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    template = tokenizer.chat_template
    return Vocabulary(
        tokens=(), types=(), merges=(),
        special=dict(zip(STOPS, stop_tokens(tokenizer, model), strict=False)),
        pre=str(_value(reader, "tokenizer.ggml.pre", "default")),
        scores=(0.0,) if has_scores else (),
        add_bos=len(dressed) > len(bare) and dressed[0] == tokenizer.bos_token_id,
        add_eos=len(dressed) > len(bare) and dressed[-1] == tokenizer.eos_token_id,
        templates=template if isinstance(template, dict) else {"default": template} if template else {},
        space_before=before,
        plain=before or how == "never",
        spaced=even_before_space or not before,
    )  # fmt: skip


def _kinds(reader: Any, model: Path, type: str) -> dict[str, str]:
    """The types of the model's weights, by their names in transformers.

    Where llama.cpp has put one together with others, or under a name that gguf's table does not give, it is taken to
    have the type of most.
    """
    import gguf

    written = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    architecture = _value(reader, "general.architecture")
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    layers = int(_value(reader, f"{architecture}.block_count", 0))
    names = None if known is None else gguf.get_tensor_name_map(known, layers)
    weights = Checkpoint(model)
    kinds: dict[str, str] = {}
    for name in weights:
        there = None if names is None else names.get_name(name, try_suffixes=(".weight", ".bias"))
        usual = FILE_TYPES[type].kind if len(weights.shape(name)) > 1 else "F32"
        kinds[name] = written.get(str(there), usual)
    return kinds


def check_rounded(made: Converted, type: str) -> None:
    """
    Raises:
        ExportError: the table of types is not for such a model.
    """
    whole = ", ".join(name for name, kind in FILE_TYPES.items() if kind.kind in (*WHOLE, "Q8_0"))
    if any(re.search(r"_exps\.|ffn_gate_inp", name) for name in made.tensors):
        raise ExportError(
            f"--type {type} is not known for a model with experts, {made.architecture} (allowed: {whole})"
        )
    if sum(bool(ROUNDED.fullmatch(name)) for name in made.tensors) < 2:
        raise ExportError(
            f"--type {type} is not known for {made.architecture}, which has other matrices (allowed: {whole})"
        )


def rewrite(source: Path, target: Path, model: Path, type: str, was: str) -> None:
    """Write a file once more, with the tokenizer's doings in it and its F32 matrices in the types of a mix.

    Args:
        model: the transformers folder that it was made from.
        type: what it is to be of. was: what ``source`` is of; where that is the same, all tensors stay as they are.

    Raises:
        ExportError: a matrix holds values that are not finite.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    architecture = str(_value(reader, "general.architecture"))
    shape, vocabulary = _shape(reader, architecture), _vocabulary(reader, model)
    own = {FILE_TYPE, VERSION, "general.architecture", *(f"tokenizer.ggml.{name}" for name in DOINGS)}
    writer = gguf.GGUFWriter(target, architecture)
    try:
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in own:
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        writer.add_add_bos_token(vocabulary.add_bos)
        writer.add_add_eos_token(vocabulary.add_eos)
        if vocabulary.scores:
            writer.add_add_space_prefix(vocabulary.space_before)
        for role, index in vocabulary.special.items():
            getattr(writer, f"add_{role}_token_id")(index)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[type].code])
        kinds = {tensor.name: str(tensor.tensor_type.name) for tensor in reader.tensors}
        for tensor in reader.tensors if type != was else ():
            if kinds[tensor.name] == "F32" and ROUNDED.fullmatch(tensor.name):
                kinds[tensor.name] = kind_of(tensor.name, tuple(tensor.data.shape), type, shape)
        for tensor in reader.tensors:
            kind = gguf.GGMLQuantizationType[kinds[tensor.name]]
            if kind == tensor.tensor_type:
                writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, kind)
            elif kind == gguf.GGMLQuantizationType.F16:
                writer.add_tensor_info(tensor.name, tensor.data.shape, np.dtype(np.float16), tensor.data.nbytes // 2)
            else:
                rounded = gguf.quant_shape_to_byte_shape(tensor.data.shape, kind)
                writer.add_tensor_info(tensor.name, rounded, np.dtype(np.uint8), int(np.prod(rounded)), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            info = writer.tensors[0][tensor.name]
            writer.write_tensor_data(Stream(_blocks(tensor, kinds[tensor.name]), info.nbytes))
    finally:
        writer.close()


def _shape(reader: Any, architecture: str) -> Shape:
    def largest(key: str, default: int = 1) -> int:
        value = _value(reader, f"{architecture}.{key}", default)
        return int(max(value)) if isinstance(value, list) else int(value)

    heads = largest("attention.head_count")
    keys = max(1, largest("attention.head_count_kv", heads))
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return Shape(largest("block_count"), heads // keys, tied)


def _blocks(tensor: Any, kind: str) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor's values in its new type, in blocks of rows."""
    import numpy as np

    data = tensor.data
    if kind == tensor.tensor_type.name:
        yield np.ascontiguousarray(data)
        return
    rows = max(1, BLOCK // data.shape[-1])
    for start in range(0, len(data), rows):
        block = np.ascontiguousarray(data[start : start + rows])
        if not np.isfinite(block).all():
            raise ExportError(f"tensor {tensor.name} holds values that are not finite: the model is broken")
        yield block.astype(np.float16) if kind == "F16" else quantize(block, kind)
