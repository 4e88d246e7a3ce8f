"""Bytes of what stays in memory all the time: weights, adapters, the optimizer's state.

Formats: NF4 with 8-bit scales (Dettmers et al. 2023, arXiv:2305.14314) as bitsandbytes stores it; LLM.int8() (Dettmers
et al. 2022, arXiv:2208.07339); 8-bit optimizer states in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ft_core.planning.blueprint import Blueprint, Outline

__all__ = ["Lent", "States", "int8_bytes", "lent_bytes", "nf4_bytes", "room_bytes", "states_of", "weight_bytes"]

BLOCK, NESTED = 64, 256
"""Numbers to a scale, and scales to a scale of theirs."""
TABLES = 16 * 4 + 256 * 4 + 4
"""What each NF4 weight has beside: the sixteen values, the 256 of its scales, and their mean."""
SMALL = 4096
"""Tensors with fewer numbers have their optimizer state in fp32 (bitsandbytes' min_8bit_size)."""
PAGED = 100_000
"""Tensors with fewer numbers have their paged state on the GPU all the same (bitsandbytes)."""


def nf4_bytes(count: int) -> int:
    """Bytes of ``count`` numbers in NF4 with nested scales, with all that belongs to the weight."""
    scales = -(-count // BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // NESTED) + TABLES


def int8_bytes(out: int, into: int) -> int:
    """Bytes of a weight ``[out, into]`` in 8 bits, with an fp32 scale for each output."""
    return out * into + 4 * out


def weight_bytes(blueprint: Blueprint, quantization: str, itemsize: int) -> int:
    """Bytes of a model's weights: linear layers as they are quantized; embeddings, norms and head in ``itemsize``."""
    rest = blueprint.parameters - sum(matrix.count for matrix in blueprint.linears)
    if quantization == "nf4":
        return rest * itemsize + sum(nf4_bytes(matrix.count) for matrix in blueprint.linears)
    if quantization == "int8":
        return rest * itemsize + sum(int8_bytes(matrix.out, matrix.into) for matrix in blueprint.linears)
    return blueprint.parameters * itemsize


@dataclass(frozen=True)
class Lent:
    """Bytes of frozen weights that may live in the host's memory (``ft_core.fast.lent``).

    Attributes:
        layer: of one layer. head: of the head. whole: of all layers, the head and the embedding.
    """

    layer: int = 0
    head: int = 0
    whole: int = 0


def lent_bytes(blueprint: Blueprint, outline: Outline, quantization: str, itemsize: int = 2) -> Lent:
    """Of a model whose adapter alone is trained; scales and norms, which are small, stay on the GPU."""
    from ft_core.fast.lent import LEAST

    each = {"nf4": 0.5, "int8": 1.0}.get(quantization, float(itemsize))
    sizes = [int(matrix.count * each) for matrix in blueprint.inner]
    layers = sum(size for size in sizes if size >= LEAST)
    if quantization == "none":
        layers += room_bytes(blueprint, outline, itemsize)
    head = blueprint.head.count * itemsize
    head = 0 if head < LEAST or outline.whole else head
    tied = bool(getattr(blueprint.text, "tie_word_embeddings", False))
    return Lent(layers // max(blueprint.layers, 1), head, layers + head * (1 if tied else 2))


def room_bytes(blueprint: Blueprint, outline: Outline, itemsize: int = 2) -> int:
    """Bytes beside frozen 16-bit weights for the low-rank updates in their products (``ft_core.fast.wide``)."""
    from ft_core.fast.wide import ALIGN
    from ft_kernels.ops.lora.operands import width

    layout = blueprint.layout
    if layout is None or not outline.able:
        return 0
    groups = {name: number for number, names in enumerate(_groups(layout)) for name in names}
    sizes: dict[tuple[str, int], list[int]] = {}  # of each group of each layer: outputs, inputs, ranks
    for matrix in blueprint.inner:
        place = next((number for name, number in groups.items() if matrix.name.endswith("." + name)), None)
        if place is None:
            continue
        module = matrix.name.rpartition(".")[0]
        found = sizes.setdefault((module, place), [0, matrix.into, 0])
        found[0] += matrix.out
        found[2] += outline.rank if matrix.name in outline.targets else 0
    total = 0
    for out, into, rank in sizes.values():
        if rank:
            total += out * (width(into, -(-rank // ALIGN) * ALIGN) - into) * itemsize
    return total


def _groups(layout: object) -> list[tuple[str, ...]]:
    attention, mlp = layout.attention, layout.mlp  # type: ignore[attr-defined]
    return [
        tuple(f"{attention.module}.{name}" for name in attention.qkv),
        (f"{attention.module}.{attention.out}",),
        tuple(f"{mlp.module}.{name}" for name in mlp.gate_up),
        (f"{mlp.module}.{mlp.down}",),
    ]


@dataclass(frozen=True)
class States:
    """An optimizer's bytes: on the ``gpu``, on the ``host``, and while it steps (``step``); moved in a step."""

    gpu: int
    host: int = 0
    step: int = 0
    moved: int = 0


def states_of(tensors: Iterable[int], optimizer: str) -> States:
    """Of an optimizer, as the configuration calls it, over tensors with so many fp32 numbers each."""
    sizes = list(tensors)
    total = sum(sizes)
    if optimizer in ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_adamw_32bit", "lion_32bit"):
        moments = 1 if optimizer.startswith("lion") else 2
        eight, paged = optimizer.endswith("8bit"), optimizer.startswith("paged")
        gpu = moments * NESTED * 4 if eight and any(count >= SMALL for count in sizes) else 0
        host = 0
        for count in sizes:
            small = count < SMALL or not eight
            state = moments * count * (4 if small else 1)
            host += state if paged and count >= PAGED else 0
            gpu += 0 if paged and count >= PAGED else state
            gpu += 0 if small else moments * 4 * -(-count // NESTED)
        return States(gpu, host, moved=12 * total + 2 * (gpu + host))
    if optimizer == "adafactor":  # a row and a column of a matrix; of the sizes no more is known here
        return States(total // 100 * 4, step=3 * 4 * max(sizes, default=0), moved=40 * total)
    if optimizer == "sgd":
        return States(0, moved=12 * total)
    fused = optimizer == "adamw_torch_fused"  # torch's own for many tensors at once makes roots of all second moments
    return States(8 * total + 4 * len(sizes), step=0 if fused else 4 * total, moved=(28 if fused else 52) * total)
