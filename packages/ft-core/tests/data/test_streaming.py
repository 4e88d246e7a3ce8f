"""A stream is packed a window at a time: every document once, the same rows again, and on from wherever one stopped."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import runpy
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from ft_core.data import Collator, PackedStream, RowStream, read_rows, tokenize_rows
from ft_core.errors import DataError

LENGTH = 64
FORMATS = ("prompt-completion", "messages")


def written(folder: Path, count: int = 300) -> Path:
    path = folder / "rows.jsonl"
    rows = ({"prompt": f"{i} is " * (i % 7 + 1), "completion": "Paris " * (i % 5 + 1)} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Counted:
    """Rows, and how many of them were read."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            self.read += 1
            yield row


@pytest.fixture
def stream(make_tokenizer: Any, tmp_path: Path) -> Any:
    """Makes a stream of 300 rows of a file, in windows of eight."""
    rows = RowStream(written(tmp_path), FORMATS)

    def make(rows: Any = rows, **changes: Any) -> PackedStream:
        return PackedStream(rows, make_tokenizer(), **{"max_length": LENGTH, "window": 8, **changes})

    return make


def documents(rows: Any) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            found[tuple(row["input_ids"][start : start + length])] += 1
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"]) <= LENGTH
    return found


def test_a_stream_of_rows_is_what_is_read_whole(tmp_path: Path) -> None:
    path = written(tmp_path)
    stream = RowStream(path, FORMATS)
    assert list(stream) == list(stream) == list(read_rows(path, FORMATS, seed=0))
    assert list(RowStream([tmp_path, {"path": path}], FORMATS)) == 2 * list(stream)


def test_a_stream_of_rows_says_what_is_wrong(tmp_path: Path) -> None:
    path = written(tmp_path, 2)
    with pytest.raises(DataError, match=r"weight 2.0: the rows of a stream are not counted, so its weight is 1"):
        RowStream([{"path": path, "weight": 2}], FORMATS)
    with pytest.raises(DataError, match="no such file or folder"):
        list(RowStream(tmp_path / "row.jsonl", FORMATS))
    with open(path, "a") as file:
        file.write('{"prompt": 3}\n')
    rows = iter(RowStream(path, FORMATS))
    assert [row["prompt"] for row in islice(rows, 2)] == ["0 is ", "1 is 1 is "]
    with pytest.raises(DataError, match=r"rows.jsonl, line 3: "):
        next(rows)


def test_every_document_once_and_rows_are_full(stream: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    rows = list(stream())
    tokenized = tokenize_rows(read_rows(tmp_path / "rows.jsonl", FORMATS, seed=0), make_tokenizer(), max_length=LENGTH)
    assert documents(rows) == Counter(tuple(ids) for ids in tokenized.input_ids)
    # Of a window's rows best fit leaves about one that is not full, of eight or more.
    assert sum(len(row["input_ids"]) for row in rows) > 0.85 * LENGTH * len(rows)


def test_no_more_than_a_window_is_read(stream: Any) -> None:
    rows = Counted([{"prompt": "what is ", "completion": "it is Paris " * 2}] * 100000)
    first = next(iter(stream(rows)))
    # Eight rows' worth of documents, and the last 32 rows that were tokenized together.
    assert rows.read <= 8 * LENGTH // min(first["seq_lengths"]) + 32


def test_equal_arguments_give_equal_rows(stream: Any) -> None:
    first = list(stream())
    assert list(stream()) == first
    assert list(stream(seed=1)) != first
    again = stream()
    assert list(again) == list(again) == first
    again.set_epoch(1)
    second = list(again)
    assert second != first
    assert documents(second) == documents(first)


def test_resumed_after_every_row(stream: Any) -> None:
    whole = list(stream())
    assert len(whole) > 40
    running = stream()
    rows = iter(running)
    for count in range(len(whole)):
        state = json.loads(json.dumps(running.state_dict()))
        resumed = stream()
        resumed.load_state_dict(state)
        for _ in range(2):  # a look at the first row does not move it
            assert list(islice(resumed, 1)) == whole[count : count + 1]
        if count % 10 == 0:
            assert list(resumed) == whole[count:]
            assert list(resumed) == whole, "the next pass is a whole one"
        next(rows)
    assert next(rows, None) is None
    assert running.state_dict()["rows_before_window"] == 0


def test_resuming_packs_one_window_and_passes_over_those_before(stream: Any, tmp_path: Path) -> None:
    running = stream()
    rows = iter(running)
    for _ in range(30):
        next(rows)
    tokenized = []

    class Noted(Counted):
        def __iter__(self) -> Iterator[Any]:
            for number, row in enumerate(self.rows):
                tokenized.append(number)
                yield row

    resumed = stream(Noted(RowStream(tmp_path / "rows.jsonl", FORMATS)))
    resumed.load_state_dict(running.state_dict())
    assert next(iter(resumed)) == next(rows)
    assert 0 < running.state_dict()["rows_before_window"] < len(tokenized) < 300


def test_the_epoch_is_part_of_the_place(stream: Any) -> None:
    running = stream()
    running.set_epoch(3)
    rows = iter(running)
    next(rows)
    resumed = stream()
    resumed.load_state_dict(running.state_dict())
    resumed.set_epoch(3)  # as trainers say it at the beginning of each
    expected = list(rows)
    assert list(resumed) == expected
    resumed.load_state_dict({**running.state_dict(), "given_of_window": 5})
    resumed.set_epoch(0)
    assert list(resumed) == list(stream())


CHILD = """
import json, os
from transformers import AutoTokenizer
from ft_core.data import PackedStream, RowStream
source, tokenizer, out = WORDS
stream = PackedStream(RowStream(source, ["prompt-completion"]), AutoTokenizer.from_pretrained(tokenizer),
                      max_length=64, window=8)
if os.path.exists(out + ".state"):
    stream.load_state_dict(json.load(open(out + ".state")))
with open(out, "a") as file:
    for row in stream:
        # The row, then the state: together they are one step of a training, and the state is what makes it one.
        file.write(json.dumps([stream.state_dict(), row]) + "\\n")
        file.flush()
        with open(out + ".new", "w") as state:
            json.dump(stream.state_dict(), state)
        os.replace(out + ".new", out + ".state")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_killed_and_resumed(stream: Any, make_tokenizer: Any, tmp_path: Path, forkserver: Any) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out, program = tmp_path / "out.jsonl", tmp_path / "program.py"
    program.write_text(CHILD, encoding="utf-8")
    words = [str(tmp_path / "rows.jsonl"), str(tmp_path / "tokenizer"), str(out)]
    for rows in (5, 23, None):
        process = forkserver.Process(target=runpy.run_path, args=(str(program), {"WORDS": words}, "__main__"))
        process.start()
        try:
            while rows is not None and (not out.exists() or out.read_bytes().count(b"\n") < rows):
                assert process.is_alive()
                time.sleep(0.002)  # the other process wants the core
            if rows is None:
                process.join(120)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == (0 if rows is None else -signal.SIGKILL)
    # A row that was written without its state, between the two, is given again: the last of each state counts.
    whole = out.read_bytes().split(b"\n")
    given = {json.dumps(state): row for state, row in (json.loads(line) for line in whole if line.endswith(b"]"))}
    assert list(given.values()) == list(stream())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_document_once(stream: Any, workers: int) -> None:
    given = [row for batch in DataLoader(stream(), batch_size=3, num_workers=workers, collate_fn=list) for row in batch]
    assert documents(given) == documents(stream())
    batch = next(iter(DataLoader(stream(), batch_size=2, collate_fn=Collator(0))))
    assert batch["position_ids"].shape == batch["input_ids"].shape


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_place_that_workers_have_is_not_taken_for_the_beginning(stream: Any, start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start} processes")
    for reading in (stream(), copy.deepcopy(stream())):
        beginning = reading.state_dict()
        loader = DataLoader(reading, batch_size=None, num_workers=1, multiprocessing_context=start)
        rows = iter(loader)
        next(rows)
        with pytest.raises(DataError) as caught:
            reading.state_dict()
        assert str(caught.value) == (
            "the stream's place is not known: the DataLoader's workers read it, each by itself; take num_workers=0"
        )
        del rows, loader
        own = iter(reading)  # here, where it is known again
        next(own)
        assert reading.state_dict() == {**beginning, "given_of_window": 1}
        reading.load_state_dict(beginning)
        assert reading.state_dict() == beginning


class Noting(PackedStream):
    """Gives each row with the state behind it, as a loader that asks its workers keeps it."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in super().__iter__():
            yield {"row": row, "state": self.state_dict()}


def test_a_worker_knows_its_own_place(stream: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    rows = RowStream(tmp_path / "rows.jsonl", FORMATS)
    noting = Noting(rows, make_tokenizer(), max_length=LENGTH, window=8)
    given = [item["state"] for item in DataLoader(noting, batch_size=None, num_workers=1)]
    running, expected = stream(), []
    for _ in running:
        expected.append(running.state_dict())
    assert given == expected


@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_a_trainer_goes_on_from_its_checkpoint(tiny: Path, tmp_path: Path, library: str) -> None:
    """transformers passes over the batches that it has trained on; the rows that follow are the same. TRL looks at the
    first row before that."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    kinds = (Trainer, TrainingArguments) if library == "transformers" else (SFTTrainer, SFTConfig)
    trainer_class, arguments_class = kinds
    more: dict[str, Any] = {"remove_unused_columns": False}
    if library == "trl":  # as the documentation has it
        more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "bf16": False}
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = RowStream(written(tmp_path), FORMATS)

    def train(resume: bool) -> list[float]:
        arguments = arguments_class(
            str(tmp_path / "run"), max_steps=6, save_steps=3, logging_steps=1, use_cpu=True, report_to="none", seed=1,
            per_device_train_batch_size=2, disable_tqdm=True, **more,
        )  # fmt: skip
        stream = PackedStream(rows, tokenizer, max_length=LENGTH, window=8)
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(tiny), args=arguments, data_collator=Collator(0),
            processing_class=tokenizer, train_dataset=stream if library == "transformers" else stream.dataset(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if resume else None)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train(False)
    assert len(set(whole)) == 6
    assert train(True) == whole


def test_mistakes(stream: Any) -> None:
    with pytest.raises(TypeError, match="rows is an iterator"):
        stream(iter([]))
    with pytest.raises(DataError, match="window must be at least 1 row, not 0"):
        stream(window=0)
    with pytest.raises(DataError, match="max_length must be at least 2"):
        stream(max_length=1)
    with pytest.raises(DataError, match="the stream's state is of window 8, this stream has 9"):
        stream(window=9).load_state_dict(stream().state_dict())
    state = stream().state_dict()
    del state["rows_before_window"]
    with pytest.raises(DataError, match="this is no state of a stream: 'rows_before_window'"):
        stream().load_state_dict(state)
    with pytest.raises(DataError, match="none of the stream's 3 rows has a trained token within max_length 64"):
        list(stream([{"prompt": "what " * 100, "completion": "no"}] * 3))
    with pytest.raises(DataError, match="row 34: "):
        list(stream([{"prompt": "what ", "completion": "no"}] * 33 + [{"prompt": 3}]))
