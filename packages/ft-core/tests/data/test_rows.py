from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_core.data import Rows, split
from ft_core.data.rows import shared
from ft_core.errors import DataError


def texts(rows: Rows) -> list[str]:
    return [row["text"] for row in rows]


def numbered(count: int) -> Rows:
    return Rows({"text": str(i)} for i in range(count))


def test_rows_are_a_sequence() -> None:
    rows = Rows([{"text": "a"}, {"prompt": "é", "completion": "\u2028"}, {"text": "c"}])
    assert (len(rows), rows[1], rows[-1]) == (3, {"prompt": "é", "completion": "\u2028"}, {"text": "c"})
    assert list(rows[::-1]) == list(reversed(list(rows)))
    assert rows.select([2, 2, 0]) == Rows([{"text": "c"}, {"text": "c"}, {"text": "a"}])
    assert rows[:1] != rows[1:2]
    assert pickle.loads(pickle.dumps(rows)) == rows  # noqa: S301  # our own bytes, as a data loader's worker gets them
    with pytest.raises(IndexError):
        rows[3]


def test_a_row_that_was_read_can_be_changed_without_changing_the_rows() -> None:
    rows = numbered(1)
    rows[0]["text"] = "changed"
    assert texts(rows) == ["0"]


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 3))
def test_split_by_share(count: int, share: float, seed: int) -> None:
    rows = numbered(count)
    expected = max(1, round(share * count))
    if expected == count:
        with pytest.raises(DataError, match="both sides need at least one row"):
            split(rows, share, seed=seed)
        return
    train, held_out = split(rows, share, seed=seed)
    assert len(held_out) == expected
    assert sorted(texts(train) + texts(held_out)) == sorted(texts(rows))
    assert (train, held_out) == split(rows, share, seed=seed)


def test_split_by_count_keeps_the_order_and_depends_on_the_seed() -> None:
    train, held_out = split(numbered(100), 20, seed=0)
    assert (len(train), len(held_out)) == (80, 20)
    assert [int(text) for text in texts(train)] == sorted(int(text) for text in texts(train))
    assert texts(held_out) != texts(split(numbered(100), 20, seed=1)[1])


def test_equal_rows_stay_on_one_side() -> None:
    rows = Rows({"text": str(i % 10)} for i in range(40)).weighted(2, seed=0)
    train, held_out = split(rows, 0.3, seed=0)
    assert not set(texts(train)) & set(texts(held_out))
    assert len(held_out) == len(set(texts(held_out))) == 3
    assert len(train) == 7 * 8


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0, float("nan"), True, "0.1", 10, 11])
def test_values_that_split_nothing(value: object) -> None:
    with pytest.raises(DataError, match="eval_split"):
        split(numbered(10), value, seed=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="1 distinct rows"):
        split(numbered(1), 0.5, seed=0)


def test_rows_on_both_sides_are_counted():
    texts = [{"text": f"text {n}"} for n in range(6)]
    train = Rows(texts[:4])
    assert shared(train, Rows(texts[3:] + texts[3:4])) == 2  # one row, held out twice
    assert shared(train, Rows(texts[4:])) == 0
    assert shared(train.select([0, 1]), Rows(texts[2:])) == 0  # left out by the selection
    assert shared(Rows.joined([train, train]), Rows(texts[:1])) == 1
