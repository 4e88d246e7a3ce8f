"""A LoRA adapter as a GGUF file of its own, which llama.cpp puts on the GGUF file of its base (``--lora``).

The file holds A and B of each adapted weight W under llama.cpp's name of W, and one alpha; llama.cpp computes
W x + (alpha / r) B (A x), with the rank r of each pair. Where the scales of pairs are not one alpha's (rsLoRA with
several ranks, alpha patterns) the rest of a scale is multiplied into B. What the table of architectures does to the
rows of W it does to those of B, since P (W + B A) = P W + (P B) A for a permutation P.

Two checks: each pair in the file against the adapter's own, by a formula written down here a second time, so that a
wrong scale is seen whatever its size; and the base as GGUF with the adapter on it in llama.cpp against the adapter on
its base in transformers.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import attach, find_base, load_model, load_tokenizer, quantization_of, read_config, stop_tokens
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.exporting import file_name
from ft_export.folders import scratch_folder
from ft_export.gguf.architectures import find_architecture, permute_keys, permute_queries
from ft_export.gguf.checking import check_in_llama_cpp
from ft_export.gguf.converter import Converted, check_convertible, convert
from ft_export.gguf.rules import Operation, plan, same
from ft_export.logprobs import Difference, difference, token_logprobs
from ft_export.merging.adapter import Adapter, LowRank, base_of
from ft_export.merging.merger import fingerprint
from ft_export.merging.weights_check import half_ulp
from ft_export.runs import Source
from ft_export.samples import read_rows, token_ids
from ft_export.seeing import sees

if TYPE_CHECKING:
    pass

__all__ = ["ADAPTER_TYPES", "LoraFile", "check_lora", "read_lora", "serve", "write_and_check", "write_lora"]

ADAPTER_TYPES = ("f16", "f32")
"""What ``--type`` may be for an adapter."""
ROWS: tuple[Operation, ...] = (same, permute_queries, permute_keys)
"""The table's operations that only change the order of a weight's rows, so that they can be done to B."""
LOST = 2.0**-8
"""How much of a tensor rounding to F16 may lose (of its norm) before f32 is asked for: what bfloat16 would lose."""
INSTEAD = "leave adapter=yes out, and the merged model is exported"


@dataclass(frozen=True)
class LoraFile:
    """An adapter on its way to a GGUF file.

    Attributes:
        adapter: its files. base: the folder of its base model.
        config: the base's transformers configuration. architecture: llama.cpp's name of it.
        pairs: by llama.cpp's name of the weight: how it changes, and what the table does to its rows.
        alpha: the one that the file says.
    """

    adapter: Adapter
    base: Path
    config: Any
    architecture: str
    pairs: dict[str, tuple[LowRank, Operation]]
    alpha: float


def read_lora(source: Source, pre: str | None = None) -> LoraFile:
    """Look at an adapter and its base before anything is computed.

    Raises:
        ExportError: there is no adapter, llama.cpp cannot do what it does, or its base cannot be converted.
    """
    if source.adapter is None:
        raise ExportError(f"{source.path} holds no adapter but a whole model: leave adapter=yes out")
    adapter = Adapter(source.adapter)
    reference = base_of(source, adapter)
    if not reference:
        raise ExportError(
            f"{adapter.folder / 'adapter_config.json'} names no base model (base_model_name_or_path): name its folder"
        )
    if source.rope is not None:
        raise ExportError(f"{source.path} was trained with rotary scaling that its base has not: {INSTEAD}")
    base = find_base(reference)
    if sees(read_config(base)):
        raise ExportError(f"{base} is a model that sees, whose tower an adapter in llama.cpp cannot change: {INSTEAD}")
    if source.on_quantized or quantization_of(base) is not None:
        raise ExportError(f"{source.path} belongs to a quantized base, whose GGUF file would be another: {INSTEAD}")
    for tensor, change in adapter.changes.items():
        _refuse(adapter, tensor, change)
    check_convertible(base, base, pre)
    _same_tokenizer(adapter, base)

    config = read_config(base)
    weights = Checkpoint(base)
    if getattr(config, "tie_word_embeddings", False) and "lm_head.weight" in adapter.changes:
        raise ExportError(f"{adapter.path} changes the head, which is the embeddings' in the base's GGUF: {INSTEAD}")
    adapter.check_shapes({name: weights.shape(name) for name in weights})
    row = find_architecture(config)
    pairs = _pairs(adapter, config, row, weights)
    alphas = [change.scale * _rank(adapter, change) for change, _ in pairs.values()]
    alpha = max(alphas, key=abs)
    if alpha == 0:  # llama.cpp takes it for 1 / scale
        raise ExportError(f"{adapter.folder / 'adapter_config.json'} has lora_alpha 0: the adapter does nothing")
    return LoraFile(adapter, base, config, row.name, pairs, alpha)


def _refuse(adapter: Adapter, tensor: str, change: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp has no such change.
    """
    what = None
    if adapter.config.get("alora_invocation_tokens"):
        what = "is on after certain tokens only (aLoRA)"
    elif not isinstance(change, LowRank):
        what = f"holds {tensor} whole (modules_to_save or a trained bias)"
    elif "magnitude" in change.parts:
        what = f"is DoRA ({tensor})"
    elif "bias" in change.parts:
        what = f"has a bias in its product (lora_bias, {change.module})"
    elif "embedding" in change.parts["A"]:
        what = f"changes the embeddings ({tensor})"
    if what is not None:
        raise ExportError(f"{adapter.path} {what}, which an adapter in llama.cpp cannot: {INSTEAD}")


def _same_tokenizer(adapter: Adapter, base: Path) -> None:
    """An adapter's file has no tokenizer: that of the base's file must do.

    Raises:
        ExportError: the adapter brings other tokens or another chat template.
    """
    mine, its = _tokenizer(adapter, base), load_tokenizer(base)
    for what, differs in (
        ("tokens", mine.get_vocab() != its.get_vocab()),
        ("a chat template", mine.chat_template != its.chat_template),
    ):
        if differs:
            raise ExportError(
                f"{adapter.folder} brings {what} that its base {base} has not, and an adapter's GGUF file has no "
                f"place for: {INSTEAD}"
            )


def _tokenizer(adapter: Adapter, base: Path) -> Any:
    """The adapter's, with the base's chat template where it has none of its own; else the base's."""
    if not (adapter.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    tokenizer = load_tokenizer(adapter.folder)
    tokenizer.chat_template = tokenizer.chat_template or load_tokenizer(base).chat_template
    return tokenizer


def _pairs(adapter: Adapter, config: Any, row: Any, weights: Checkpoint) -> dict[str, tuple[LowRank, Operation]]:
    import gguf

    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[row.name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    outputs = plan(row, config, list(weights))
    pairs: dict[str, tuple[LowRank, Operation]] = {}
    for tensor, change in adapter.changes.items():
        assert isinstance(change, LowRank)
        targets = [output for output in outputs if tensor in output.sources]
        if len(targets) != 1 or targets[0].sources != (tensor,) or targets[0].make not in ROWS:
            raise ExportError(f"{adapter.path} changes {tensor}, which {row.name} has in another form: {INSTEAD}")
        name = names.get_name(targets[0].name, try_suffixes=(".weight",))
        if name is None:
            raise ExportError(f"{adapter.path} changes {tensor}, for which llama.cpp has no place")
        pairs[str(name)] = (change, targets[0].make)
    return pairs


def _rank(adapter: Adapter, change: LowRank) -> int:
    return adapter.files.shape(change.parts["A"])[0]


def write_lora(lora: LoraFile, out: Path, type: str, name: str) -> dict[str, dict[str, Any]]:
    """Write the adapter's file.

    Returns:
        By name: type, shape and SHA-256 of each tensor.

    Raises:
        ExportError: values that are not finite, or that F16 cannot hold.
    """
    import gguf
    import numpy as np

    dtype = np.dtype(np.float16 if type == "f16" else np.float32)
    writer = gguf.GGUFWriter(out, lora.architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if type == "f16" else gguf.LlamaFileType.ALL_F32)
        parts = [(weight, part) for weight in lora.pairs for part in ("A", "B")]
        for weight, part in parts:
            change, _ = lora.pairs[weight]
            shape = lora.adapter.files.shape(change.parts[part])
            writer.add_tensor_info(f"{weight}.lora_{part.lower()}", shape, dtype, shape[0] * shape[1] * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = {}
        for weight, part in parts:
            array = _value(lora, weight, part, type)
            writer.write_tensor_data(array)
            written[f"{weight}.lora_{part.lower()}"] = {
                "type": type.upper(),
                "shape": list(array.shape),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
    finally:
        writer.close()
    return written


def _value(lora: LoraFile, weight: str, part: str, type: str) -> Any:
    """What is written of A or B, as a numpy array."""
    import torch

    change, rows = lora.pairs[weight]
    value = lora.adapter.files.tensor(change.parts[part]).float()
    if not bool(torch.isfinite(value).all()):
        raise ExportError(f"{lora.adapter.path}: {change.parts[part]} holds values that are not finite: it is broken")
    if part == "B":
        factor = change.scale * _rank(lora.adapter, change) / lora.alpha
        value = rows([value if factor == 1 else value * factor], lora.config)
    value = value.contiguous()
    if type == "f32":
        return value.numpy()
    half = value.half()
    lost = (half.float() - value).norm()
    if not bool(lost <= LOST * value.norm()):
        raise ExportError(f"{lora.adapter.path}: {change.parts[part]} has values that F16 cannot hold: pass --type f32")
    return half.numpy()


def check_lora(lora: LoraFile, file: Path) -> float:
    """Compare the file, read back, with the adapter's own.

    Returns:
        The largest distance of a value, scale and all, in units of the rounding that is allowed; at most 1.

    Raises:
        ExportError: a pair is missing or is not the adapter's; names the weight.
    """
    import gguf
    import torch

    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    there = {tensor.name: tensor for tensor in reader.tensors}
    places = {change.tensor: weight for weight, (change, _) in lora.pairs.items()}
    largest = 0.0
    for tensor_name, change in lora.adapter.changes.items():
        assert isinstance(change, LowRank)
        weight = places.get(tensor_name, "")
        rank = _rank(lora.adapter, change)
        for part, wanted, scale in (("A", 1.0, 1.0), ("B", change.scale, alpha / rank)):
            tensor = there.pop(f"{weight}.lora_{part.lower()}", None)
            if tensor is None:
                raise ExportError(f"the file lacks lora_{part} of {change.tensor}, which the adapter changes")
            written = torch.from_numpy(tensor.data.copy())
            own = lora.adapter.files.tensor(change.parts[part]).double()
            if part == "B":
                own = own[_order(lora, weight, own.shape[0])]
            values, exact = scale * written.double(), wanted * own
            # two fp32 roundings, of alpha and of the factor on B, beside that to the file's type
            allowed = abs(scale) * half_ulp(written.abs().double(), written.dtype) + 2.0**-22 * exact.abs()
            ratio = ((values - exact).abs() / allowed).max().item() if values.shape == exact.shape else float("inf")
            if not ratio <= 1:
                raise ExportError(
                    f"lora_{part} of {change.tensor} in the file is not the adapter's: it is off by {ratio:.3g} times "
                    "what rounding may"
                )
            largest = max(largest, ratio)
    if there:
        raise ExportError(f"the file holds {sorted(there)[0]}, which the adapter has not")
    return largest


def _order(lora: LoraFile, weight: str, rows: int) -> list[int]:
    """Which of the adapter's rows stands in each row of the file.

    llama.cpp's ``llama`` rotates neighbours: the first half of a head in the even rows, the second in the odd ones.
    """
    heads = {
        "attn_q": lora.config.num_attention_heads,
        "attn_k": lora.config.num_key_value_heads or lora.config.num_attention_heads,
    }.get(weight.split(".")[-2])
    if lora.architecture != "llama" or heads is None:
        return list(range(rows))
    size = rows // heads
    return [head * size + at for head in range(heads) for i in range(size // 2) for at in (i, size // 2 + i)]


def write_and_check(
    lora: LoraFile, source: Source, partial: Path, file: Path, type: str, pre: str | None, lines: list[str]
) -> tuple[Converted, dict[str, Any]]:
    """Write the adapter into ``partial``, and check it on its base in llama.cpp.

    Args:
        file: what ``partial`` will be; the base's GGUF lies beside it in the meantime.
        lines: gets what was found.

    Returns:
        The base as it was converted, and what goes into ``proof.json``.

    Raises:
        ExportError: a check failed.
    """
    written = write_lora(lora, partial, type, file_name(source))
    largest = check_lora(lora, partial)
    lines.append(
        f"checked {len(lora.pairs)} pairs of A and B in the file against the adapter: largest error {largest:.3f} of "
        f"the rounding of {type}"
    )
    tokenizer = _tokenizer(lora.adapter, lora.base)
    with scratch_folder(file) as scratch:
        made = convert(lora.base, scratch / "base-f16.gguf", pre=pre, name=file_name(source))
        model = _adapted(lora)
        moved = _moved(model, source.held_out, tokenizer)
        lines.append(
            f"the adapter moves log-probabilities of {moved.tokens} tokens by {moved.mean:.2e} nats on average, "
            f"{moved.largest:.2e} at most"
        )
        stops = stop_tokens(tokenizer, lora.base)
        kinds = _kinds(model, made.kinds, type)
        found = check_in_llama_cpp(
            made, lambda: model, tokenizer, stops, source.held_out, "f16", kinds, lines, adapter=partial
        )
    proof = {
        "type": type,
        "adapter_sha256": fingerprint(lora.adapter.folder),
        "alpha": lora.alpha,
        "largest_error": largest,
        "moves": moved.as_dict(),
        "base": {"folder": str(lora.base), "type": "f16", "tensors": made.tensors},
        **found,
        "tensors": written,
    }
    return made, proof


def _adapted(lora: LoraFile) -> Any:
    """The adapter on its base in transformers, in fp32."""
    import torch

    return attach(load_model(lora.base, torch.float32), lora.adapter.folder)


def _moved(model: Any, held_out: Path | None, tokenizer: Any) -> Difference:
    """What the adapter does to the tokens of the held-out rows, so that the comparison can be read beside it."""
    samples = [ids for ids in (token_ids(row, tokenizer) for row in read_rows(held_out)) if len(ids) > 1]
    samples = samples or [token_ids(row, tokenizer) for row in read_rows(None)]
    with_it = token_logprobs(model, samples)
    with model.disable_adapter():
        return difference(with_it, token_logprobs(model, samples))


def _kinds(model: Any, base: Mapping[str, str], type: str) -> dict[str, str]:
    """The types in the two files, by PEFT's names of parameters."""
    return {
        name: type.upper()
        if ".lora_" in name
        else base.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."), "F32")
        for name, _ in model.named_parameters()
    }


def serve(lora: LoraFile, folder: Path, file: Path) -> str:
    """The commands that make the base's file and serve both."""
    base = folder / f"{file_name(Source(lora.base, lora.base.absolute().name))}-f16.gguf"
    make = shlex.join(["ft", "export", str(lora.base), "--to", "gguf", "--out", str(folder)])
    return f"{make} && {shlex.join(['llama-server', '-m', str(base), '--lora', str(file), '--jinja'])}"
