"""Towers that are told their images' lengths: the same numbers, and no question to the device but the first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ft_vision.families.towers import KNOWN, _Lengths, tell_lengths


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_the_same_numbers(name: str, family: Any) -> None:
    model = AutoModelForImageTextToText.from_pretrained(family(name)).eval()
    told = copy.deepcopy(model)
    assert tell_lengths(told) == len(model.model.visual.blocks)
    assert tell_lengths(told) == len(model.model.visual.blocks)  # again changes nothing
    grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
    generator = torch.Generator().manual_seed(0)
    width = 3 * 2 * 14 * 14
    pixels = torch.randn(int(grids.prod(1).sum()), width, generator=generator)
    with torch.no_grad():
        expected, found = (m.model.visual(pixels, grid_thw=grids) for m in (model, told))
    first = lambda out: out[0] if isinstance(out, tuple) else out.last_hidden_state  # noqa: E731 (by version)
    assert torch.equal(first(expected), first(found))


def test_other_families_stay(family: Any) -> None:
    assert tell_lengths(AutoModelForImageTextToText.from_pretrained(family("llava"))) == 0


def test_lengths_are_asked_for_once() -> None:
    lengths, bounds = _Lengths(), [torch.tensor([0, n], device="meta") for n in range(KNOWN + 1)]
    asked: list[int] = []

    class Asked(torch.Tensor):
        def cpu(self, *args: Any, **keywords: Any) -> torch.Tensor:
            asked.append(1)
            return torch.tensor([0, 1])

    kinds = [bound.as_subclass(Asked) for bound in bounds]
    for _ in range(3):
        for kind in kinds[:KNOWN]:
            lengths.of(kind)
    assert len(asked) == KNOWN
    lengths.of(kinds[KNOWN])
    assert len(asked) == KNOWN + 1
    assert len(lengths._known) == KNOWN
    own = torch.tensor([0, 3])
    assert lengths.of(own) is own
