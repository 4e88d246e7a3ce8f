"""Which type each tensor of a GGUF file gets: llama.cpp's own mixes, as a table.

A file type names the type of most matrices. Its S, M and L mixes give some of them another: those that hurt most where
they are rounded most (the values' projection, the way down of the perceptron, attention's output), in all layers or in
some; and the head, or the embedding where it is the head too, never less than Q6_K. Source: ``llama_tensor_get_type``
of llama.cpp's ``src/llama-quant.cpp``, as llama.cpp v0.5.0 has it, for models without experts and without an importance
matrix. A test holds whole files against llama.cpp's own tool byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["FILE_TYPES", "FileType", "Shape", "kind_of"]


@dataclass(frozen=True)
class Shape:
    """What a mix depends on.

    Attributes:
        layers: how many. groups: heads of queries for one of keys.
        tied: whether the embedding is the head too.
        is_70b: whether llama.cpp takes the model for one of that size: its eight query heads a key's make the values'
            projection so small that more bits cost nothing.
    """

    layers: int
    groups: int = 1
    tied: bool = False
    is_70b: bool = False


Where = Callable[[int, Shape], bool]
"""Of a layer's number: whether a line of a mix is for it."""


def _everywhere(layer: int, shape: Shape) -> bool:
    return True


def _grouped(layer: int, shape: Shape) -> bool:
    return shape.groups >= 4


def _ends_and_thirds(layer: int, shape: Shape) -> bool:
    """The first and last eighth, and every third layer between."""
    eighth = shape.layers // 8
    return layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2


def _first(count: int) -> Where:
    return lambda layer, shape: layer < count


def _first_of(parts: int) -> Where:
    return lambda layer, shape: layer < shape.layers // parts


Mix = dict[str, tuple[tuple[Where, str], ...]]
"""By kind of tensor: lines, of which the first that is for a layer counts."""


@dataclass(frozen=True)
class FileType:
    """A ``--type``.

    Attributes:
        kind: ggml's name of the type of most matrices.
        code: ``gguf.LlamaFileType``'s name, which the file says it has.
        mix: what has another.
    """

    kind: str
    code: str
    mix: Mix


def _always(kind: str) -> tuple[tuple[Where, str], ...]:
    return ((_everywhere, kind),)


_HIGHER: Mix = {"attn_v": ((_ends_and_thirds, "Q6_K"),), "ffn_down": ((_ends_and_thirds, "Q6_K"),)}

FILE_TYPES: dict[str, FileType] = {
    "f16": FileType("F16", "MOSTLY_F16", {}),
    "f32": FileType("F32", "ALL_F32", {}),
    "bf16": FileType("BF16", "MOSTLY_BF16", {}),
    "q8_0": FileType("Q8_0", "MOSTLY_Q8_0", {}),
    "q6_k": FileType("Q6_K", "MOSTLY_Q6_K", {}),
    "q5_k_m": FileType("Q5_K", "MOSTLY_Q5_K_M", _HIGHER),
    "q5_k_s": FileType("Q5_K", "MOSTLY_Q5_K_S", {}),
    "q4_k_m": FileType("Q4_K", "MOSTLY_Q4_K_M", _HIGHER),
    "q4_k_s": FileType(
        "Q4_K", "MOSTLY_Q4_K_S", {"attn_v": ((_first(4), "Q5_K"),), "ffn_down": ((_first_of(8), "Q5_K"),)}
    ),
    "q3_k_l": FileType(
        "Q3_K", "MOSTLY_Q3_K_L",
        {"attn_v": _always("Q5_K"), "ffn_down": _always("Q5_K"), "attn_output": _always("Q5_K")},
    ),
    "q3_k_m": FileType(
        "Q3_K", "MOSTLY_Q3_K_M",
        {
            "attn_v": ((_first(2), "Q5_K"), (_everywhere, "Q4_K")),
            "ffn_down": ((_first_of(16), "Q5_K"), (_everywhere, "Q4_K")),
            "attn_output": _always("Q4_K"),
        },
    ),
    "q3_k_s": FileType("Q3_K", "MOSTLY_Q3_K_S", {}),
    "q2_k": FileType(
        "Q2_K", "MOSTLY_Q2_K",
        {
            "attn_v": ((_grouped, "Q4_K"), (_everywhere, "Q3_K")),
            "ffn_down": _always("Q3_K"),
            "attn_output": _always("Q3_K"),
        },
    ),
    "q5_1": FileType("Q5_1", "MOSTLY_Q5_1", {}),
    "q5_0": FileType("Q5_0", "MOSTLY_Q5_0", {}),
    "q4_1": FileType("Q4_1", "MOSTLY_Q4_1", {}),
    "q4_0": FileType("Q4_0", "MOSTLY_Q4_0", {}),
}  # fmt: skip
"""By the name that ``--type`` takes; the default first."""

WHOLE = ("F32", "F16", "BF16")
"""Types that are no blocks."""
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What a matrix gets whose rows cannot be cut into blocks of 256: the next larger type of blocks of 32."""
VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
"""Projections that make values, alone or among others."""


def kind_of(name: str, dimensions: tuple[int, ...], file_type: str, shape: Shape, float32: tuple[str, ...] = ()) -> str:
    """ggml's name of the type that a tensor has in a file.

    Args:
        name: the tensor's name in the file. dimensions: its shape, rows last.
        file_type: of :data:`FILE_TYPES`. float32: endings of names that are never rounded.
    """
    if len(dimensions) < 2 or not name.endswith("weight") or name.endswith(("_norm.weight", *float32)):
        return "F32"
    chosen = FILE_TYPES[file_type]
    if chosen.kind in WHOLE:
        return chosen.kind
    return _fitting(_mixed(name, dimensions[-1], chosen, shape), dimensions[-1])


def _mixed(name: str, width: int, chosen: FileType, shape: Shape) -> str:
    if name == "output.weight" or (shape.tied and name == "token_embd.weight"):
        return "Q8_0" if chosen.kind == "Q8_0" or width % _block(chosen.kind) else "Q6_K"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None:
        return chosen.kind
    part = "attn_v" if found[2] in VALUES else found[2]
    lines = chosen.mix.get(part, ())
    kind = next((kind for where, kind in lines if where(int(found[1]), shape)), chosen.kind)
    return "Q5_K" if part == "attn_v" and shape.is_70b and kind in ("Q3_K", "Q4_K") else kind


def _fitting(kind: str, width: int) -> str:
    """The type, or the next one whose blocks a row of this width can be cut into."""
    if width % _block(kind) == 0:
        return kind
    other = FALLBACK.get(kind, "F16")
    return other if width % _block(other) == 0 else "F16"


def _block(kind: str) -> int:
    """Neighbouring values of a row that share a scale."""
    return 1 if kind in WHOLE else 256 if kind.endswith("_K") else 32
