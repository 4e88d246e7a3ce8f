from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_core.data import Packed, pack, tokenize_rows


@given(st.data(), st.integers(1, 64))
def test_every_document_once_and_no_row_over_capacity(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == pack(list(lengths), capacity)
    # any two rows together exceed the capacity, or best fit would have joined them: at most twice the least number
    assert len(rows) <= max(2 * sum(lengths) / capacity, 1)


def test_best_fit_is_chosen() -> None:
    # 6 leaves 4, 5 leaves 5; the 4 goes where it fits exactly, the 5 likewise
    assert pack([4, 6, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]
    assert pack([], 10) == []


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_fit_no_row(length: int) -> None:
    with pytest.raises(ValueError, match=rf"document 1 has {length} tokens; a row takes 1 to 10"):
        pack([3, length], 10)


def test_packed_rows_are_their_documents(make_tokenizer: Any) -> None:
    rows = [{"prompt": "what is " * (i % 5 + 1), "completion": "it is Paris " * (i % 3 + 1)} for i in range(40)]
    tokenized = tokenize_rows(rows, make_tokenizer(), max_length=64)
    packed = Packed(tokenized, 64)
    assert len(packed) < len(tokenized)
    assert 0.8 < packed.fill <= 1
    for row, documents in zip(packed, packed.documents, strict=True):
        assert row["seq_lengths"] == [tokenized.lengths[i] for i in documents]
        assert row["input_ids"] == [token for i in documents for token in tokenized[i]["input_ids"]]
        assert row["labels"] == [label for i in documents for label in tokenized[i]["labels"]]
    dataset = packed.dataset()
    assert dataset.column_names == ["input_ids", "labels", "seq_lengths"]
    assert list(dataset) == list(packed)
    assert list(tokenized.dataset()) == list(tokenized)
