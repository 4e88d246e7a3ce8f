"""Where images belong once padding is left out, and what rows share stands once."""

from __future__ import annotations

from typing import Any

import torch

from ft_core.fast.beside import Beside
from ft_core.fast.scores import Unpadded

WORD, IMAGE, PAD = 5, 9, 0


def batch(shown: list[list[int]], ends: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, Beside]:
    """Rows that begin with a word, then two tokens for each image, then what is theirs; padded on the left."""
    rows = [[WORD, *[IMAGE] * 2 * len(images), *end] for images, end in zip(shown, ends, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = (ids != PAD).long()
    number, begins = torch.full_like(ids, -1), torch.zeros_like(mask, dtype=torch.bool)
    for line, (images, row) in enumerate(zip(shown, rows, strict=True)):
        for place, image in enumerate(images):
            at = width - len(row) + 1 + 2 * place
            number[line, at : at + 2], begins[line, at] = image, True
    pieces: dict[str, Any] = {"pixel_values": [torch.full((1, 3), float(i)) for i in range(3)]}
    coordinates = torch.arange(ids.numel()).view(1, *ids.shape).repeat(3, 1, 1)
    return ids, mask, Beside(pieces, number, begins, {"types": (ids == IMAGE).long()}, coordinates)


def test_a_batch_as_it_is_shows_an_image_in_each_row() -> None:
    ids, mask, beside = batch([[2], [0, 2], []], [[6], [7], [8]])
    made = beside.padded((mask.cumsum(1) - 1).clamp(min=0))
    assert made["pixel_values"][:, 0].tolist() == [2, 0, 2]
    assert torch.equal(made["types"], (ids == IMAGE).long())
    assert made["position_ids"].shape == (4, *ids.shape)
    assert torch.equal(made["position_ids"][1:], beside.coordinates)


def test_rows_that_show_the_same_share_it() -> None:
    ends = [[6, 6, 6], [7, 7], [6, 6, 6], [8]]
    ids, mask, beside = batch([[1], [1], [0], []], ends)
    row = Unpadded.of(ids, mask, share=True, beside=beside)
    # The first two begin alike. The third's tokens do too, but it shows another image.
    assert row.branches == [[3, 3, 2], [0, 6], [0, 2]]
    made = beside.packed(row)
    assert made["pixel_values"][:, 0].tolist() == [1, 0]
    assert made["types"].shape == row.ids.shape
    assert torch.equal(made["types"], (row.ids == IMAGE).long())
    assert made["position_ids"].shape == (4, *row.ids.shape)
    for line in range(4):  # where what is a row's own lies, its coordinates do
        own, count = beside.coordinates[0, line][mask[line].bool()], len(ends[line])  # type: ignore[index]
        assert torch.equal(made["position_ids"][1, 0, row.at[line][mask[line].bool()]][-count:], own[-count:])
    assert Unpadded.of(ids, mask, share=True).branches != row.branches


def test_apart_every_document_has_its_own() -> None:
    ids, mask, beside = batch([[1], [1], [0]], [[6, 6, 6], [7, 7], [6]])
    row = Unpadded.of(ids, mask, beside=beside)
    assert row.branches is None
    made = beside.packed(row)
    assert made["pixel_values"][:, 0].tolist() == [1, 1, 0]
    assert torch.equal(row.ids[0], ids[mask.bool()])
    assert torch.equal(made["position_ids"][1:, 0], beside.coordinates[:, mask.bool()])  # type: ignore[index]


def test_text_goes_on_from_the_largest_coordinate() -> None:
    _, mask, beside = batch([[1], []], [[6], [7, 8]])
    made = beside.ahead(mask)
    expected = beside.coordinates[0].masked_fill(~mask.bool(), -1).amax(1) + 1 - mask.sum(1)  # type: ignore[index]
    assert made is not None
    assert made.tolist() == expected.tolist()
    assert Beside({}, beside.number, beside.begins, {}).ahead(mask) is None
