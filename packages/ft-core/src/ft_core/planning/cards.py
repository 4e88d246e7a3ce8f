"""GPUs: what a training step gets out of each, and which one is meant.

A card's peaks are its maker's (dense products in 16 bits with sums in fp32, no sparsity). ``share`` is what a whole
step sustains of the products' peak, all that its matrix products wait for included. It was measured on an H200 (Llama
3.1 8B, 2 x 2048 tokens, bf16: 126 TFLOP of products in 190 of 236 ms; ``benchmarks/NOTES.md``) and taken for the H100,
which has the same processor; for every other card it is estimated, from how far its power lets large products come.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ft_core.errors import ConfigError

__all__ = ["CARDS", "Card", "card_here", "find_card", "with_memory"]

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as its maker writes it. memory: bytes that CUDA sees, all of them.
        peak: product operations a second in 16 bits; 0 where nothing is known of it but the memory.
        share: of the peak that a step sustains. bandwidth: bytes a second of its memory, the maker's figure.
        link: bytes a second each way to pinned host memory.
        capability: CUDA's. basis: ``measured``, ``from H200`` or ``estimated``.
    """

    name: str
    memory: int
    peak: float
    share: float
    bandwidth: float
    link: float
    capability: tuple[int, int]
    basis: str = "estimated"


def _card(
    name: str, gib: float, tflops: float, share: float, gb: float, link: float, sm: tuple[int, int], basis: str = ""
) -> Card:
    return Card(name, int(gib * GIB), tflops * 1e12, share, gb * 1e9, link * 1e9, sm, basis or "estimated")


CARDS: tuple[Card, ...] = (
    # name, GiB, TFLOP/s, share, GB/s of memory, GB/s to the host, compute capability
    _card("B200", 178.4, 2250, 0.60, 8000, 53, (10, 0)),
    _card("H200", 139.8, 989, 0.673, 4800, 53, (9, 0), "measured"),
    _card("H100 80GB", 79.1, 989, 0.673, 3350, 53, (9, 0), "from H200"),
    _card("H100 PCIe", 79.1, 756, 0.60, 2039, 53, (9, 0)),
    _card("H100 NVL", 93.1, 835, 0.62, 3938, 53, (9, 0)),
    _card("GH200 96GB", 94.5, 989, 0.67, 4000, 200, (9, 0)),
    _card("A100 80GB", 79.2, 312, 0.74, 2039, 24, (8, 0)),
    _card("A100 40GB", 39.4, 312, 0.74, 1555, 24, (8, 0)),
    _card("L40S", 44.4, 362, 0.55, 864, 24, (8, 9)),
    _card("L40", 44.4, 181, 0.55, 864, 24, (8, 9)),
    _card("L4", 22.0, 121, 0.45, 300, 24, (8, 9)),
    _card("A40", 44.4, 150, 0.55, 696, 24, (8, 6)),
    _card("A30", 23.5, 165, 0.55, 933, 24, (8, 0)),
    _card("A10G", 22.0, 70, 0.72, 600, 24, (8, 6)),
    _card("A10", 22.0, 125, 0.50, 600, 24, (8, 6)),
    _card("RTX A6000", 47.4, 155, 0.62, 768, 24, (8, 6)),
    _card("RTX 6000 Ada", 47.4, 364, 0.55, 960, 24, (8, 9)),
    _card("RTX PRO 6000", 94.9, 504, 0.62, 1792, 53, (12, 0)),
    _card("RTX 5090", 31.4, 210, 0.80, 1792, 53, (12, 0)),
    _card("RTX 5080", 15.5, 113, 0.80, 960, 53, (12, 0)),
    _card("RTX 5070 Ti", 15.5, 88, 0.80, 896, 53, (12, 0)),
    _card("RTX 5070", 11.6, 62, 0.80, 672, 53, (12, 0)),
    _card("RTX 5060 Ti 16GB", 15.5, 47, 0.80, 448, 26, (12, 0)),
    _card("RTX 5060 Ti 8GB", 7.6, 47, 0.80, 448, 26, (12, 0)),
    _card("RTX 4090", 23.6, 165, 0.82, 1008, 24, (8, 9)),
    _card("RTX 4080 Super", 15.7, 104, 0.82, 736, 24, (8, 9)),
    _card("RTX 4080", 15.7, 97, 0.82, 717, 24, (8, 9)),
    _card("RTX 4070 Ti Super", 15.6, 88, 0.82, 672, 24, (8, 9)),
    _card("RTX 4070 Ti", 11.6, 80, 0.82, 504, 24, (8, 9)),
    _card("RTX 4070 Super", 11.6, 71, 0.82, 504, 24, (8, 9)),
    _card("RTX 4070", 11.6, 58, 0.82, 504, 24, (8, 9)),
    _card("RTX 4060 Ti 16GB", 15.6, 44, 0.82, 288, 12, (8, 9)),
    _card("RTX 4060 Ti 8GB", 7.6, 44, 0.82, 288, 12, (8, 9)),
    _card("RTX 4060", 7.6, 30, 0.82, 272, 12, (8, 9)),
    _card("RTX 3090 Ti", 23.7, 80, 0.82, 1008, 24, (8, 6)),
    _card("RTX 3090", 23.7, 71, 0.82, 936, 24, (8, 6)),
    _card("RTX 3080 Ti", 11.7, 68, 0.82, 912, 24, (8, 6)),
    _card("RTX 3080", 9.8, 60, 0.82, 760, 24, (8, 6)),
    _card("RTX 3070", 7.7, 41, 0.82, 448, 24, (8, 6)),
    _card("RTX 3060", 11.7, 25, 0.82, 360, 24, (8, 6)),
    _card("T4", 14.6, 65, 0.38, 320, 12, (7, 5)),
    _card("V100 32GB", 31.7, 125, 0.62, 900, 12, (7, 0)),
    _card("V100 16GB", 15.8, 125, 0.62, 900, 12, (7, 0)),
)
"""The cards that are known by name. Memory is what CUDA reports, a little less than the name says."""

BY_MULTIPROCESSOR = {
    (7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512,
}  # fmt: skip
"""Product operations of a multiprocessor in one clock, by compute capability (the makers' peaks divided)."""
NOISE = {
    "nvidia", "geforce", "tesla", "rtx", "gpu", "generation", "blackwell", "server", "workstation", "edition",
    "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "480gb",
}  # fmt: skip
"""Words that tell no card from another, and those of its kind of memory (a GH200's 480 GB are its host's)."""
SIZE = r"(\d{2,3}|\d{1,3}(?=g))(?:gi?b?)?"
SEVERAL = (
    r"(?P<before>\d{1,2})\s*(?:[x\u00d7*]\s*|\s)(?P<one>.+)|(?P<other>.+?)\s*(?<![a-z])[x\u00d7*]\s*(?P<after>\d{1,2})"
)
"""A card's name with how many of them: ``8x H100``, ``8 H100``, ``H100 x8``."""


def find_card(name: str, memory: int | None = None, *, say: Callable[[str], None] = lambda line: None) -> Card:
    """The card of a name, however it is spelled: ``RTX 4090``, ``rtx4090``, ``NVIDIA GeForce RTX 4090``.

    Args:
        memory: bytes that the card is to have: of several sizes the one that is nearest. Without it, and where the name
            doesn't tell, the smallest is taken: what fits there fits the others too.
        say: is told which one was taken, and which others there are.

    Raises:
        ConfigError: there is none, or none of the size that the name says, or the name is of several GPUs; one line
            with the nearest spelling.
    """
    found, sizes = _named(name), _read(name)[1]
    said = [card for card in found if any(_has(card, int(size)) for size in sizes)]
    if said or (found and not sizes):
        fitting = said or found
        if memory is not None:
            return min(fitting, key=lambda card: abs(card.memory - memory))
        smallest = min(fitting, key=lambda card: card.memory)
        if others := [card.name for card in fitting if card is not smallest]:
            say(f"--gpu {name!r} is taken as {smallest.name!r}, the smallest of that name (also: {', '.join(others)})")
        return smallest
    if found:
        known = " and ".join(repr(card.name) for card in found)
        raise ConfigError(
            f"--gpu {name!r}: with so much memory no such card is known: give {known}, and --memory for another amount"
        )
    several = re.fullmatch(SEVERAL, name.strip().lower())
    if several is not None and _named(several["one"] or several["other"]):
        one = find_card(several["one"] or several["other"], memory)
        if int(several["before"] or several["after"]) == 1:
            return one
        raise ConfigError(f"--gpu {name!r} is more than one GPU: a plan is for one, so name one: {one.name!r}")
    names = [card.name for card in CARDS]
    # A card of another number is another card, however similar its name.
    lowered = {known.lower(): known for known in names if _same_number(name, known)}
    close = difflib.get_close_matches(name.lower(), list(lowered), 1, cutoff=0.5)
    hint = f"; did you mean {lowered[close[0]]!r}?" if close else ""
    raise ConfigError(
        f"--gpu {name!r} is no card that is known{hint} (known: {', '.join(names)}); "
        "for any other give the memory in its place, such as --memory 8GiB"
    )


def with_memory(card: Card | None, memory: int) -> Card:
    """The card with so many bytes of memory; without a card one of which nothing else is known, and no times."""
    if card is None:
        return Card(f"a GPU with {memory / GIB:g} GiB", memory, 0.0, 0.0, 0.0, 0.0, (9, 0))
    return replace(card, memory=memory)


def card_here() -> Card | None:
    """This machine's GPU: by its name, else by its properties; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    name, total = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[1]
    known = min(_named(name), key=lambda card: abs(card.memory - total), default=None)
    if known is not None and 0.75 < total / known.memory < 1.25:
        return replace(known, name=name, memory=total)
    return _by_properties(torch.cuda.get_device_properties(index), name, total)


def _named(name: str) -> list[Card]:
    """The cards whose name is meant, of all sizes."""
    words = _read(name)[0]
    # NVIDIA's "A100-PCIE-40GB" is an A100; "H100 PCIe" is another card than the H100 on its board, and is listed.
    for wanted in (words, words - {"pcie"}):
        if found := [card for card in CARDS if wanted and _read(card.name)[0] == wanted]:
            return found
    return []


def _has(card: Card, size: int) -> bool:
    """Whether a card is sold as one with so many GB: what CUDA reports is up to a tenth less."""
    return 0.9e9 * size <= card.memory <= 1.02 * GIB * size


def _same_number(name: str, known: str) -> bool:
    """Whether two names may be spellings of one: their numbers are the same, or three digits and more begin alike or
    are in another order; and both are a ``Ti``, or neither."""
    one, other = (
        max(re.findall(r"\d+", text.split("gb")[0]) or [""], key=len) for text in (name.lower(), known.lower())
    )
    kinds = [set(re.findall(r"ti\b|super|laptop|mobile", text.lower())) for text in (name, known)]
    alike = one.startswith(other) or other.startswith(one) or sorted(one) == sorted(other)
    return kinds[0] == kinds[1] and (one == other or (min(len(one), len(other)) > 2 and alike))


def _read(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that tell a card from others, and the sizes of its memory in GB."""
    spaced = re.sub(r"rtx(?=\d)", "rtx ", re.sub(r"(?<=\d)\s+(?=gi?b\b)", "", name.lower()))
    spaced = re.sub(r"(?<=\d)(ti|super)\b|(?<=ti)(super)\b", r" \1\2", spaced)
    words = {word for word in re.split(r"[^a-z0-9]+", spaced) if word and not word.startswith("hbm")} - NOISE
    sizes = {found[1] for word in words if (found := re.fullmatch(SIZE, word))}
    return frozenset(word for word in words if not re.fullmatch(SIZE, word)), frozenset(sizes)


def _by_properties(properties: Any, name: str, memory: int) -> Card:
    """A card that is not known, from its multiprocessors, clocks and bus; a modest guess where torch knows none."""
    capability = (int(properties.major), int(properties.minor))
    each = BY_MULTIPROCESSOR.get(capability) or (512 if capability > (8, 0) else 256)
    clock = float(getattr(properties, "clock_rate", 0) or 1_500_000) * 1e3
    bus = float(getattr(properties, "memory_bus_width", 0) or 256) / 8
    rate = float(getattr(properties, "memory_clock_rate", 0) or 7_000_000) * 1e3 * 2
    peak = properties.multi_processor_count * clock * each
    return Card(name, memory, peak, 0.6, bus * rate, 12e9, capability)
