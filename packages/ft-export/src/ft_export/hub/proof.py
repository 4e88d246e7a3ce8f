"""What ``proof.json`` says: the figures of the checks behind the files, without anybody's texts or paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_export import __version__
from ft_export.checkpoints import Checkpoint
from ft_export.exporting import PROOF, save_proof
from ft_export.hub.staging import File
from ft_export.merging.merger import MARKER, check_unchanged
from ft_export.runs import read_json

__all__ = ["FORMAT", "Proof", "of_combination", "of_gguf", "of_weights", "write_proof", "write_pushed"]

FORMAT = "hub_format"
MERGE = (
    "libraries", "base_dtype", "dtype", "dequantized_base", "adapter_sha256", "tokenizer_from", "samples", "weights",
    "logprobs", "combination",
)  # fmt: skip
"""What is taken from ``merge.json``: figures and versions, no paths."""
GGUF = (
    "type", "architecture", "pre_tokenizer", "libraries", "texts_with_equal_tokens",
    "conversations_with_equal_template", "stop_tokens", "prompts", "prompts_with_images", "mmproj",
    "tensors",
)  # fmt: skip
CONTINUATIONS = (
    "tokens", "equal", "close", "error", "yardstick", "bound_largest", "bound_mean", "cost", "perplexity",
    "answers_equal",
)  # fmt: skip
"""Of the continuations the figures; the prompts and answers are somebody's data."""


@dataclass(frozen=True)
class Proof:
    """Attributes:
    lines: for people.
    figures: for ``proof.json``.
    """

    lines: tuple[str, ...]
    figures: dict[str, Any] = field(default_factory=dict)


def of_weights(folder: Path, made_from: Path, adapter: bool) -> Proof:
    """Of a model's or an adapter's files: whether they are whole, and the merge where there was one.

    Args:
        folder: with the files that are pushed.
        made_from: the folder that they came from, which may hold ``merge.json``.

    Raises:
        ExportError: a weight file is missing, truncated or broken.
    """
    stored = Checkpoint(folder, "adapter_model") if adapter else Checkpoint(folder)
    count = len(list(stored))
    lines = [f"All {count} tensors that the headers name are in the safetensors files, and no file is cut short."]
    figures: dict[str, Any] = {"tensors": count}
    if not adapter and (made_from / MARKER).is_file():
        said = read_json(made_from / MARKER)
        check_unchanged(made_from)
        figures["merge"] = {key: said[key] for key in MERGE if key in said}
        weights, logprobs = said["weights"], said["logprobs"]
        lines.append(
            f"The merge: each tensor was compared with what base and adapter stand for ({weights['merged']} merged, "
            f"{weights['replaced']} replaced, {weights['untouched']} untouched); the largest error is "
            f"{weights['largest_error']:.3f} of the rounding that is allowed."
        )
        if logprobs is None:
            lines.append("What the merged model says was not compared with the adapter on its base.")
            return Proof(tuple(lines), figures)
        merged = logprobs["merged"]
        lines.append(
            f"Outputs of {merged['tokens']} tokens against the adapter on its base in fp32: largest difference "
            f"{merged['largest']:.2e} (bound {logprobs['bound_largest']:.2e}), mean {merged['mean']:.2e} (bound "
            f"{logprobs['bound_mean']:.2e})."
        )
    return Proof(tuple(lines), figures)


def of_combination(merged: Path) -> list[str]:
    """A line on a merge of several adapters or with a weight, since a card tells of one run; paths are left out.

    Args:
        merged: the folder that a run's adapter is merged in, which may not be there.
    """
    said = read_json(merged / MARKER) if (merged / MARKER).is_file() else {}
    how, parts = said.get("combination"), said.get("adapters")
    if not isinstance(how, dict) or not isinstance(parts, list):
        return []
    weights = [f"{part['weight']:g}" for part in parts]
    if len(weights) == 1:
        return [f"The adapter was merged with the weight {weights[0]}, not 1."]
    return [
        f"The weights are those of {len(weights)} adapters, combined by PEFT ({how['type']}) with the weights "
        f"{', '.join(weights[:-1])} and {weights[-1]}: what this card says of data, training and evaluation is of the "
        "first alone."
    ]


def of_gguf(said: dict[str, Any]) -> Proof:
    """Of a GGUF file, from the entry that its own export wrote."""
    figures = {key: said[key] for key in GGUF if key in said}
    found = {key: said["continuations"][key] for key in CONTINUATIONS}
    figures["continuations"] = found
    lines = [
        f"llama.cpp splits {said['texts_with_equal_tokens']} texts into the same tokens as the tokenizer, and renders "
        f"{said['conversations_with_equal_template']} conversations in the chat template byte for byte alike."
        if said["conversations_with_equal_template"]
        else f"llama.cpp splits {said['texts_with_equal_tokens']} texts into the same tokens as the tokenizer.",
        f"Greedy continuations in llama.cpp against transformers: {found['equal']} of {found['tokens']} tokens equal, "
        f"the others within {found['close']:.2e} nats."
        if found["equal"] < found["tokens"]
        else f"Greedy continuations in llama.cpp against transformers: all {found['tokens']} tokens equal.",
        f"Log-probabilities: largest difference {found['error']['largest']:.2e} (bound {found['bound_largest']:.2e}), "
        f"mean {found['error']['mean']:.2e} (bound {found['bound_mean']:.2e}).",
        f"The type's own cost: perplexity of the prompts {found['perplexity']['before']:.4g} before rounding, "
        f"{found['perplexity']['after']:.4g} after.",
    ]
    return Proof(tuple(lines), figures)


def write_proof(folder: Path, proof: Proof, type: str, files: Sequence[File]) -> Path:
    """Write ``proof.json``, the same for the same files, so that pushing once more sends nothing."""
    said = {
        FORMAT: 1,
        "type": type,
        "ft_export": __version__,
        "checks": list(proof.lines),
        "figures": proof.figures,
        "files": {file.name: {"size": file.size, "sha256": file.sha256} for file in files},
    }
    return save_proof(folder, said)


def write_pushed(folder: Path, pushed: dict[str, Any]) -> None:
    """Add to the ``proof.json`` on this machine what the Hub has said that it holds."""
    save_proof(folder, {**read_json(folder / PROOF), "pushed": pushed})
