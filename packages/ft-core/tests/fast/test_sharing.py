"""Rows that begin alike are computed once: which they are, and that a model says the same of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ft_core as ft
from ft_core import fast
from ft_core.fast.documents import Batch
from ft_core.fast.scores import Scorer, Unpadded
from ft_core.fast.sharing import Group, groups_of, saved
from ft_kernels import plan_attention


def rows(*given: list[int]) -> list[Any]:
    return [np.array(row) for row in given]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        ([[1]], [Group(0, (0,))]),
        ([[1, 2], [3, 2]], [Group(0, (0,)), Group(0, (1,))]),
        # a pair each, although all four have a first token in common
        ([[9, 1, 1, 5], [9, 2, 2, 5], [9, 1, 1, 6], [9, 2, 2, 6]], [Group(3, (0, 2)), Group(3, (1, 3))]),
        # five times two tokens save more than twice three and four times two
        ([[9, 9, 1], [9, 9, 1], [9, 9, 2], [9, 9, 3], [9, 9, 4], [9, 9, 5]], [Group(2, (0, 1, 2, 3, 4, 5))]),
        # one is where another begins, and two are the same
        ([[4, 5, 6, 7], [4, 5], [8, 8, 8], [8, 8, 8]], [Group(2, (0, 1)), Group(3, (2, 3))]),
    ],
)
def test_groups(given: list[list[int]], expected: list[Group]) -> None:
    found = groups_of(rows(*given))
    assert found == expected
    assert saved(found, 10) == sum(group.shared * (len(group.rows) - 1) for group in expected) / 10


def padded(*given: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch with padding on the left of every second row, and on the right of the others."""
    longest = max(map(len, given)) + 1
    ids, mask = torch.zeros(len(given), longest, dtype=torch.int64), torch.zeros(len(given), longest)
    for i, row in enumerate(given):
        place = slice(longest - len(row), longest) if i % 2 else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), 1
    return ids, mask


NEAR = {"rtol": 1e-9, "atol": 1e-11}
BATCH = ([5, 6, 7, 8, 9, 10], [11, 12, 13], [5, 6, 7, 8, 14], [11, 12, 15, 16, 17, 18], [], [5, 6, 7, 8])


def test_a_row_of_groups() -> None:
    ids, mask = padded(*BATCH)
    row = Unpadded.of(ids, mask, share=True)
    assert row.branches == [[4, 2, 1, 0], [2, 1, 4]]
    assert row.ids.tolist() == [[5, 6, 7, 8, 9, 10, 14, 11, 12, 13, 15, 16, 17, 18]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 4, 5, 4, 0, 1, 2, 2, 3, 4, 5]]
    assert row.ids[0][row.places(mask.bool())].tolist() == [token for given in BATCH for token in given]
    assert row.lengths == [6, 3, 5, 6, 4]
    plain = Unpadded.of(ids, mask)
    assert plain.branches is None
    assert plain.ids[0][plain.places(mask.bool())].tolist() == plain.ids[0].tolist()


def test_too_little_to_share() -> None:
    ids, mask = padded(list(range(1, 40)), [1, *range(50, 90)])
    assert Unpadded.of(ids, mask, share=True).branches is None


@pytest.mark.parametrize("listened", [False, True], ids=["layers", "layers by themselves"])
def test_states(tiny: Path, listened: bool) -> None:
    model, _ = ft.load(str(tiny), dtype="float32")
    adapted: Any = ft.add_lora(model, r=4).double().train()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    fast.enable(adapted)
    if listened:  # a layer with a hook is transformers' own, with a mask of pairs
        adapted.get_base_model().model.layers[0].self_attn.register_forward_hook(lambda *given: None)
    scorer = Scorer.of(adapted)
    assert scorer is not None
    ids, mask = padded(*BATCH)
    results = []
    for share in (True, False):
        row = Unpadded.of(ids, mask, share=share)
        hidden = scorer.hidden(row)[row.places(mask.bool())]
        weight = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        results.append([hidden, *torch.autograd.grad((hidden * weight).sum(), trained)])
    for one, other in zip(*results, strict=True):
        # transformers' own layers norm in float32, whatever they are given
        torch.testing.assert_close(one, other, **({"rtol": 1e-4, "atol": 1e-5} if listened else NEAR))


def test_many_copies_count_in_memory() -> None:
    few, many = (Batch(plan_attention(branches=groups)) for groups in ([[10, 5, 5]], [[10, *[1] * 90]]))
    assert (few.counted(20), many.counted(100)) == (20, 330)
    assert Batch(plan_attention(lengths=[10, 10])).counted(20) == Batch(None).counted(20) == 20
