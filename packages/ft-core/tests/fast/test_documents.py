"""What the fast layers make of a batch's mask and positions."""

from __future__ import annotations

import pytest
import torch

from ft_core.fast.documents import batch_of

ROWS = {
    "no padding": ([[1, 1, 1], [1, 1, 1]], None),
    "right": ([[1, 1, 0], [1, 1, 1]], (2, 1, 3)),
    "left": ([[0, 0, 1], [0, 1, 1]], (2, 1, 1, 2)),
    "both": ([[0, 1, 0], [1, 0, 0]], (1, 1, 1, 1, 2)),
    "a row of nothing else": ([[0, 0, 0], [1, 1, 0]], (3, 2, 1)),
}


@pytest.mark.parametrize("form", ROWS)
def test_runs_of_tokens_and_of_padding(form):
    mask, lengths = ROWS[form]
    batch = batch_of((2, 3), torch.tensor(mask), None, None, {})
    assert batch is not None
    assert (None if batch.plan is None else batch.plan.lengths) == lengths


def test_a_row_with_a_hole_is_no_document():
    assert batch_of((2, 3), torch.tensor([[1, 1, 1], [1, 0, 1]]), None, None, {}) is None


def test_positions_of_padded_rows():
    """They may count from anywhere, but must not restart within a row's tokens."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    counted = batch_of((2, 4), mask, torch.tensor([[5, 6, 7, 1], [1, 0, 1, 2]]), None, {})
    assert counted is not None
    assert counted.plan is not None
    assert counted.plan.lengths == (3, 1, 1, 3)
    assert batch_of((2, 4), mask, torch.tensor([[0, 0, 1, 1], [1, 0, 1, 2]]), None, {}) is None


def test_restarting_positions_are_documents():
    batch = batch_of((1, 6), None, torch.tensor([[0, 1, 2, 0, 1, 0]]), None, {})
    assert batch is not None
    assert batch.plan is not None
    assert batch.plan.lengths == (3, 2, 1)
