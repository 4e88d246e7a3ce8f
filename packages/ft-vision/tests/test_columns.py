"""The columns in which data sets of answers, captions and transcripts come."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_core.config.load import check_config
from ft_core.data import read_rows
from ft_core.errors import DataError
from ft_core.training.modality import of_modality

FORMATS = ("messages", "sharegpt", "prompt-completion", "alpaca", "text")
PLACE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def read(folder: Path, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = check_config({"model": "m", "task": "vision", "data": str(path)})
    return list(read_rows(str(path), FORMATS, seed=0, form=of_modality(config, "rows")))


@pytest.mark.parametrize(
    ("columns", "asked", "answer", "answers"),
    [
        ({"question": "q", "answer": "1"}, [PLACE, text("q")], "1", None),
        ({"question": "q", "answer": 7}, [PLACE, text("q")], "7", None),
        ({"question": "q", "answers": ["a", "b", "b"]}, [PLACE, text("q")], "b", ["a", "b"]),
        ({"question": "q", "answers": ["a", "a"]}, [PLACE, text("q")], "a", None),
        ({"question": "<image>\nq?", "answer": "1"}, [PLACE, text("q?")], "1", None),
        ({"query": "q", "label": ["14"]}, [PLACE, text("q")], "14", None),  # ChartQA
        ({"question": "q", "answers": [{"answer": a, "answer_id": 1} for a in ("no", "net", "net")]},  # VQAv2
         [PLACE, text("q")], "net", ["no", "net"]),
        ({"question": "q", "multiple_choice_answer": "net", "answers": None}, [PLACE, text("q")], "net", None),
        ({"question": "q", "answer": "x", "answers": ["x", "y"]}, [PLACE, text("q")], "x", ["x", "y"]),
        ({"question": "q", "answer": "z", "answers": ["x", "x", 2]}, [PLACE, text("q")], "z", ["z", "x", "2"]),
        ({"question": "q", "answer": "x", "answers": [{"answer": "x"}]}, [PLACE, text("q")], "x", None),
        ({"question": "q", "answer": "x", "answers": []}, [PLACE, text("q")], "x", None),
        ({"text": "what it reads"}, [PLACE], "what it reads", None),
        ({"caption": "a cat"}, [PLACE], "a cat", None),
        ({"captions": ["a cat", "a pet"]}, [PLACE], "a cat", ["a cat", "a pet"]),
        ({"prompt": "q", "completion": "1"}, [PLACE, text("q")], "1", None),
        ({"instruction": "q", "input": "more", "output": "1"}, [PLACE, text("q\n\nmore")], "1", None),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "1"}]},
         [PLACE, text("q")], "1", None),
    ],
)  # fmt: skip
def test_columns_are_a_conversation(
    columns: dict[str, Any], asked: Any, answer: str, answers: Any, tmp_path: Path
) -> None:
    (made,) = read(tmp_path, {"image": "a.png", "id": 3, **columns})
    user, assistant = made["messages"]
    assert user == {"role": "user", "content": asked}
    assert (assistant["role"], assistant["content"]) == ("assistant", answer)
    assert made["images"] == [str(tmp_path / "a.png")]
    assert made.get("answers") == answers


def test_the_cauldrons_turns(tmp_path: Path) -> None:
    turns = [{"user": "q", "assistant": "1", "source": "s"}, {"user": "r", "assistant": "2"}]
    (made,) = read(tmp_path, {"images": ["a.png", "b.png"], "texts": turns})
    assert [message["content"] for message in made["messages"]] == [[PLACE, PLACE, text("q")], "1", "r", "2"]


def test_a_run_can_be_trained_on_what_a_parquet_file_of_the_hub_has(
    configure: Callable[..., Path], ft: Callable[..., Any], tmp_path: Path
) -> None:
    import datasets

    images = [Image.new("RGB", (56, 56), (40 * n, 0, 0)) for n in range(4)]
    rows = {"image": images, "question": ["which?"] * 4, "answers": [["1", "one"]] * 4}
    made = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            image=datasets.Image(), question=datasets.Value("string"), answers=datasets.List(datasets.Value("string"))
        ),
    )
    made.to_parquet(str(tmp_path / "data.parquet"))
    done = ft("train", configure(data=str(tmp_path / "data.parquet"), training={"max_steps": 1}, eval_split=1))
    assert done.code == 0, done.err
    (held,) = [json.loads(line) for line in (tmp_path / "run" / "held_out.jsonl").read_text().splitlines()]
    assert held["answers"] == ["1", "one"]
    encoded = held["images"][0].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (56, 56)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a", "question": "q"}, "columns 'image', 'question' fit no format"),
        ({"image": "a", "question": "q", "answers": []}, "answers is empty, so there is nothing to learn"),
        ({"image": "a", "question": "q", "answer": " "}, "answer must be text, a number or a list of them, not empty"),
        ({"image": "a", "question": {"en": "q"}, "answer": "1"}, "question must be text, not a dict"),
        (
            {"image": "a", "question": "q", "answers": [{"text": "b"}]},
            "answers must be text, a number or a list of them",
        ),
        ({"image": "a", "caption": [["b"]]}, "caption must be text, a number or a list of them, not a list"),
        ({"images": ["a"], "texts": [{"user": "q"}]}, r"texts\[0\] must be an object with 'user' and 'assistant'"),
        ({"question": "q", "answer": "1"}, "columns 'question', 'answer' fit no format"),
    ],
)
def test_what_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl, line 1: {message}"):
        read(tmp_path, row)
