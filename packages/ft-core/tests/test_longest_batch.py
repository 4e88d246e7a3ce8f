"""The longest batch is the longest of all that are collated, and what cannot be counted is not tried."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import IterableDataset as Stream
from torch.utils.data import DataLoader

from ft_core.data import Collator
from ft_core.training.longest import longest_batch, tokens_in
from ft_core.training.replan import ReplanningMixin
from ft_core.training.sft import _collate


class Trainer:
    """A trainer as far as its batches go."""

    batch_tokens = ReplanningMixin.batch_tokens

    def __init__(self, dataset: Any, collator: Any, batch_size: int = 2, **loader: Any) -> None:
        self.train_dataset, self.data_collator = dataset, collator
        self.loader = {"batch_size": batch_size, **loader}
        self.args = SimpleNamespace(max_steps=-1, gradient_accumulation_steps=1)

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, collate_fn=self.data_collator, **self.loader)


def packed(*rows: list[int]) -> Dataset:
    """Rows of documents of these lengths."""
    ids = [[7] * sum(lengths) for lengths in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "seq_lengths": [list(lengths) for lengths in rows]})


ROWS = ([8, 8], [8, 8], [1, 12], [1, 1], *([[1] * 9 + [6]] * 2), [3], [2])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["free", "padded", "either", "unknown"])
def test_packed_rows_by_what_the_collator_makes_of_them(kind, batch_size):
    """A padded row a document: [8, 8] twice are 32 tokens, nine single ones and one of six are 120."""
    collator = {
        "free": Collator(0), "padded": Collator(0, padding_free=False),
        "unknown": Collator(0, padding_free=False).__call__,
        "either": _collate(0, padding_free=True, on_cpu=True, lengths=False),
    }[kind]  # fmt: skip
    trainer = Trainer(packed(*ROWS), collator, batch_size)
    every = [tokens_in(batch) for batch in trainer.get_train_dataloader()]
    assert len(set(every)) > 1
    found = longest_batch(trainer)
    assert found is not None
    assert tokens_in(found) == max(every)


@pytest.mark.parametrize("shares", [False, True])
def test_a_prompt_that_is_computed_once_counts_once(shares):
    def pair(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
        return {
            "chosen_ids": [7] * (prompt + chosen), "rejected_ids": [7] * (prompt + rejected), "prompt_length": prompt,
        }  # fmt: skip

    rows = [pair(20, 1, 2), pair(2, 15, 15), pair(1, 3, 3)]  # 43 and 34 tokens, or 23 and 32

    class Pairs:
        def __call__(self, features: Any) -> Any:
            (row,) = features
            return {"input_ids": torch.tensor([row["chosen_ids"] + row["rejected_ids"]])}

        def batch_tokens(self, lengths: Any) -> int:
            return sum(lengths)

    trainer = Trainer(Dataset.from_list(rows), Pairs(), batch_size=1)
    trainer.shares_prompts = shares
    found = longest_batch(trainer)
    assert found is not None
    assert tokens_in(found) == (34 if shares else 43)


def test_only_batches_that_are_trained_on_count():
    trainer = Trainer(packed(*ROWS), Collator(0))
    every = [tokens_in(batch) for batch in trainer.get_train_dataloader()]
    for steps, accumulation in ((1, 1), (1, 2), (100, 1)):
        trainer.args = SimpleNamespace(max_steps=steps, gradient_accumulation_steps=accumulation)
        found = longest_batch(trainer)
        assert found is not None
        assert tokens_in(found) == max(every[: steps * accumulation])


def test_only_the_longest_is_made_where_the_collator_says_which():
    made = []

    class Counting(Collator):
        def __call__(self, features: Any) -> Any:
            made.append(len(features))
            return super().__call__(features)

    assert longest_batch(Trainer(packed(*ROWS), Counting(0, padding_free=False))) is not None
    assert made == [2]


def not_read() -> Iterator[dict[str, Any]]:
    raise AssertionError("a row was read")
    yield {}


class TorchStream(torch.utils.data.IterableDataset):
    column_names = ("input_ids",)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return not_read()

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a row was read")

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("make", [TorchStream, lambda: Stream.from_generator(not_read)], ids=["torch", "datasets"])
def test_no_row_of_a_stream_is_read(make, caplog):
    caplog.set_level("DEBUG", "ft_core")
    trainer = Trainer(make(), Collator(0))
    assert longest_batch(trainer) is None
    del trainer.train_dataset  # known by its loader alone
    stream = make()
    trainer.get_train_dataloader = lambda: SimpleNamespace(batch_sampler=[[0, 1]], dataset=stream)  # type: ignore[method-assign]
    assert longest_batch(trainer) is None
    assert not caplog.records


def stack(rows: Any) -> dict[str, Any]:
    width = max(len(row["a_ids"] or []) for row in rows)
    return {"input_ids": torch.zeros(len(rows), width, dtype=torch.int64)}


def test_columns_of_ids_that_are_no_lists_and_lists_that_are_not_there():
    features = Features({"row_ids": Value("int64"), "a_ids": List(Value("int64")), "b_ids": Value("string")})
    data = {"row_ids": [1, 2, 3, 4], "a_ids": [[1], None, [1, 2, 3], []], "b_ids": ["a"] * 4}
    found = longest_batch(Trainer(Dataset.from_dict(data, features=features), stack))
    assert found is not None
    assert found["input_ids"].shape == (2, 3)
    assert longest_batch(Trainer(Dataset.from_dict({"row_ids": [1, 2]}), stack)) is None
    assert longest_batch(Trainer(Dataset.from_dict({"input_ids": ["a", "b"]}), stack)) is None
    assert longest_batch(Trainer(Dataset.from_dict({"input_ids": [[[1]], [[2]]]}), stack)) is None


def test_rows_made_by_a_transform_are_not_counted():
    dataset = Dataset.from_dict({"raw_ids": [[1], [1, 2]]})
    dataset.set_transform(lambda rows: pytest.fail("a row was read"))
    assert longest_batch(Trainer(dataset, Collator(0))) is None


class Slow(torch.utils.data.Dataset):
    """Rows that take time to make."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        return {"input_ids": [7] * (index % 7 + 1), "labels": [7] * (index % 7 + 1)}


def test_a_torch_dataset_says_its_lengths_or_is_not_read():
    dataset = Slow(21)
    trainer = Trainer(dataset, Collator(0))
    assert longest_batch(trainer) is None
    assert dataset.read == 0
    dataset.lengths = [index % 7 + 1 for index in range(21)]  # type: ignore[attr-defined]
    found = longest_batch(trainer)
    assert dataset.read == 2
    assert found is not None
    assert tokens_in(found) == max(tokens_in(batch) for batch in trainer.get_train_dataloader())


def test_rows_in_a_list_are_counted():
    rows = list(packed(*ROWS))
    trainer = Trainer(rows, Collator(0, padding_free=False))
    found = longest_batch(trainer)
    assert found is not None
    assert tokens_in(found) == max(tokens_in(batch) for batch in trainer.get_train_dataloader())


class Endless:
    """Batches without end, which a training of so many steps takes from."""

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield [0]


def test_a_failure_is_logged_and_no_error(caplog):
    caplog.set_level("DEBUG", "ft_core")
    rows = packed([3], [2])

    def broken(features: Any) -> Any:
        raise ValueError("broken")

    for number, trainer in enumerate(
        (
            Trainer(rows, broken),
            Trainer([{"text": "a"}], Collator(0)),
            Trainer(rows, Collator(0), batch_size=1, batch_sampler=Endless()),
        ),
        1,
    ):
        assert longest_batch(trainer) is None
        assert len(caplog.records) == number
        assert caplog.records[-1].levelname == "DEBUG"
