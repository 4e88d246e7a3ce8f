"""The batches of the packing benchmark: one draw for all of them, and each in the form that its contestant takes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
packed = pytest.importorskip("packed")


def test_batches_are_drawn_by_the_seed_alone() -> None:
    found = packed.batches(15, 0, 128000)
    assert found == packed.batches(15, 0, 128000) != packed.batches(15, 1, 128000)
    lengths = [[len(document) for document in batch] for batch in found]
    assert all(len(batch) == 16 for batch in lengths)
    assert {50 <= n <= 2000 for batch in lengths for n in batch} == {True}
    totals = [sum(batch) for batch in lengths]
    assert totals[0] == max(totals)
    assert totals[1] % 16 == 0
    assert len(set(totals)) == 15


@pytest.mark.parametrize("contestant", ["ft", "unsloth-packed", "unsloth"])
def test_the_same_tokens_for_all(contestant: str) -> None:
    batch = packed.batches(2, 0, 512, divide=8)[1]
    given = packed.given(contestant, batch)
    tokens = [token for document in batch for token in document]
    if contestant == "unsloth":
        assert given["input_ids"].shape == (16, max(map(len, batch)))
        assert given["input_ids"][given["attention_mask"].bool()].tolist() == tokens
    else:
        assert given["input_ids"].tolist() == [tokens]
        stated = given["document_lengths"] if contestant == "ft" else given["packed_seq_lengths"].tolist()
        assert stated == [len(document) for document in batch]
        assert given["position_ids"][0].eq(0).sum() == 16
    assert given["labels"].ne(-100).sum() == len(tokens) - 16
