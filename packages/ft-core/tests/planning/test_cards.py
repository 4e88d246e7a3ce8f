"""Cards by the names that people, shops and CUDA give them."""

from __future__ import annotations

import types

import pytest

from ft_core.errors import ConfigError
from ft_core.planning import CARDS, find_card, with_memory
from ft_core.planning.cards import _by_properties


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("h100", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("A100 80", "A100 80GB"),
        ("a100", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert find_card(name).name == expected


def test_every_card_is_found_by_its_own_name() -> None:
    for card in CARDS:
        assert find_card(card.name) is card


@pytest.mark.parametrize(("name", "near"), [("RTX 409", "RTX 4090"), ("H1000", "H100"), ("RTX 4070 Ti", "RTX 4070")])
def test_an_unknown_name_has_a_nearest_spelling(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}"):
        find_card(name)


def test_a_card_with_other_memory() -> None:
    card = with_memory(find_card("A10G"), 12 * 2**30)
    assert (card.memory, card.peak) == (12 * 2**30, find_card("A10G").peak)
    assert with_memory(None, 2**33).peak == 0


@pytest.mark.parametrize(
    ("name", "processors", "clock", "capability", "bus", "memory_clock"),
    [
        ("RTX 4090", 128, 2_520_000, (8, 9), 384, 10_501_000),
        ("RTX 3090", 82, 1_695_000, (8, 6), 384, 9_751_000),
        ("A100 40GB", 108, 1_410_000, (8, 0), 5120, 1_215_000),
    ],
)
def test_an_unknown_card_from_its_properties(
    name: str, processors: int, clock: int, capability: tuple[int, int], bus: int, memory_clock: int
) -> None:
    properties = types.SimpleNamespace(
        multi_processor_count=processors, clock_rate=clock, major=capability[0], minor=capability[1],
        memory_bus_width=bus, memory_clock_rate=memory_clock,
    )  # fmt: skip
    found, known = _by_properties(properties, "a card", 2**34), find_card(name)
    assert found.peak == pytest.approx(known.peak, rel=0.02)
    assert found.bandwidth == pytest.approx(known.bandwidth, rel=0.02)
