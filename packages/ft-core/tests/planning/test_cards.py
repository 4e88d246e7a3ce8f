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
        ("A100 80 GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("H200 141GB", "H200"),
        ("L4 24GB", "L4"),
        ("4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("RTX 4060 Ti 8 GB", "RTX 4060 Ti 8GB"),
        ("rtx4060ti", "RTX 4060 Ti 8GB"),
        ("RTX 4070 Ti", "RTX 4070 Ti"),
        ("4070super", "RTX 4070 Super"),
        ("1x A40", "A40"),
        ("A40 x1", "A40"),
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


@pytest.mark.parametrize(
    ("name", "near"),
    [("RTX 409", "RTX 4090"), ("H1000", "H100"), ("RTX 4900", "RTX 4090")],
)
def test_an_unknown_name_has_a_nearest_spelling(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}"):
        find_card(name)


@pytest.mark.parametrize(
    ("name", "smallest", "others"),
    [
        ("A100", "A100 40GB", "A100 80GB"),
        ("Tesla V100", "V100 16GB", "V100 32GB"),
        ("4060 Ti", "RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"),
    ],
)
def test_of_several_sizes_the_smallest_is_taken_and_said(name: str, smallest: str, others: str) -> None:
    said: list[str] = []
    assert find_card(name, say=said.append).name == smallest
    assert said == [f"--gpu {name!r} is taken as {smallest!r}, the smallest of that name (also: {others})"]
    for told in (smallest, others):  # a name that tells the size needs no line, nor does an amount of memory
        assert find_card(told, say=said.append).name == told
        assert find_card(name, find_card(told).memory, say=said.append).name == told
    assert len(said) == 1


@pytest.mark.parametrize(
    ("name", "known"), [("RTX 3080 12GB", "'RTX 3080'"), ("A100 20GB", "'A100 80GB' and 'A100 40GB'")]
)
def test_a_size_that_is_not_known_is_not_passed_over(name: str, known: str) -> None:
    with pytest.raises(ConfigError, match=f"give {known}, and --memory for another amount"):
        find_card(name)


@pytest.mark.parametrize("name", ["8x H100", "8xH100", "8 x h100", "8 H100", "H100 x8", "H100x8", "2 * H100 80GB"])
def test_several_gpus_are_not_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is more than one GPU: a plan is for one, so name one: 'H100 80GB'$"):
        find_card(name)


@pytest.mark.parametrize("name", ["GTX 1080", "GTX 1080 Ti", "RTX 2080", "RTX 5065", "MI300X", "8x nothing"])
def test_a_card_of_another_number_is_not_proposed(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no card that is known \(known: .*give the memory .* --memory 8GiB$"):
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


def test_another_card_is_no_spelling() -> None:
    with pytest.raises(ConfigError) as caught:
        find_card("RTX 3060 Ti")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"name one: 'A100 40GB'$"):
        find_card("8x A100 40GB")
