"""Real files of every format, and every mistake that a file can hold: one line each."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ft_core.data import FORMATS, Rows, RowStream, read_rows, recognise
from ft_core.errors import DataError

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SFT = ("messages", "prompt-completion", "alpaca", "sharegpt", "text")

# format -> a row as users have it, and its normal form
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": [ASK, ANSWER], "id": 7}, {"messages": [ASK, ANSWER]}),
    "prompt-completion": ({"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
    "alpaca": (
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {
            "messages": [{"role": "user", "content": "Add.\n\n2 2"}, ANSWER],
            "alpaca": {"instruction": "Add.", "input": "2 2"},
        },
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"messages": [ASK, ANSWER]},
    ),
    "text": ({"text": "Zwei und zwei: vier. 四"}, {"text": "Zwei und zwei: vier. 四"}),
    "preference": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
    ),
    "labelled": (
        {"prompt": [ASK], "completion": "4", "label": 1, "id": 7},
        {"prompt": [ASK], "completion": [ANSWER], "label": True},
    ),
    "prompt": ({"prompt": "2+2=", "answer": 4}, {"prompt": "2+2=", "answer": 4}),
}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def message(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_jsonl(tmp_path: Path, name: str) -> None:
    given, normal = EXAMPLES[name]
    assert recognise(given) == name
    assert list(read_rows(jsonl(tmp_path / "a.jsonl", given, given), [name], seed=0)) == [normal, normal]


@pytest.mark.parametrize("name", FORMATS)
def test_a_normal_form_is_read_back_as_it_is(tmp_path: Path, name: str) -> None:
    normal = EXAMPLES[name][1]
    assert read_rows(jsonl(tmp_path / "held_out.jsonl", normal), tuple(FORMATS), seed=0)[0] == normal


@pytest.mark.parametrize("name", ["prompt-completion", "alpaca", "text", "messages"])
def test_csv(tmp_path: Path, name: str) -> None:
    given, normal = EXAMPLES[name]
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(given)
        writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in given.values()])
    assert list(read_rows(tmp_path / "a.csv", SFT, seed=0)) == [normal]


def test_csv_keeps_long_cells_and_line_breaks_within_them(tmp_path: Path) -> None:
    text = "a line, with a comma\n" * 20_000  # 420 kB: past the csv module's own limit
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [text], ["b"]])
    limit = csv.field_size_limit()
    assert [row["text"] for row in read_rows(tmp_path / "a.csv", ["text"], seed=0)] == [text, "b"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", FORMATS)
def test_parquet(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    given, normal = EXAMPLES[name]
    pq.write_table(pa.Table.from_pylist([given] * 3), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet", [name], seed=0)) == [normal] * 3


def test_json_as_a_list_and_as_lines(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    jsonl(tmp_path / "lines.json", {"text": "c"}, {"text": "d"})
    jsonl(tmp_path / "one.json", {"text": "e"})
    rows = read_rows([tmp_path / f"{name}.json" for name in ("list", "lines", "one")], ["text"], seed=0)
    assert [row["text"] for row in rows] == list("abcde")


def test_a_txt_file_is_one_row_and_a_bom_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert list(read_rows(str(tmp_path / "a.txt"), ["text"], seed=0)) == [{"text": "one\n\ntwo\n"}]
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "x"}\n\n{"text": "y"}')
    assert [row["text"] for row in read_rows(tmp_path / "b.jsonl", ["text"], seed=0)] == ["x", "y"]


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / ".cache").mkdir()
    jsonl(tmp_path / "b.jsonl", {"text": "b"})
    jsonl(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"})
    jsonl(tmp_path / "below" / "c.jsonl", {"text": "c"})
    jsonl(tmp_path / ".cache" / "d.jsonl", {"text": "hidden"})
    (tmp_path / "README.md").write_text("about")
    rows = read_rows(tmp_path, SFT, seed=0)
    assert list(rows) == [{"prompt": "p", "completion": "c"}, {"text": "b"}, {"text": "c"}]


def test_a_text_beside_data_is_a_note_about_it(tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "LICENSE.TXT").write_text("mine")
    assert [row["text"] for row in read_rows(tmp_path, SFT, seed=0)] == ["about", "mine"]  # texts alone are the data
    jsonl(tmp_path / "b" / "a.jsonl", {"text": "a"})
    assert list(read_rows(tmp_path, SFT, seed=0)) == [{"text": "a"}]


def test_what_lies_in_a_run_folder_is_no_data(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "a"})
    run = tmp_path / "runs" / "mine"
    (run / "adapter").mkdir(parents=True)
    for name in ("environment.json", "config.yaml", "held_out.jsonl", "metrics.jsonl", "adapter/tokenizer.json"):
        (run / name).write_text('{"text": "not mine"}\n')
    assert list(read_rows(tmp_path, SFT, seed=0)) == [{"text": "a"}]
    with pytest.raises(DataError, match=r"mine: is a run folder; the rows that it kept from training are in its held_"):
        read_rows(run, SFT, seed=0)
    assert list(read_rows(run / "held_out.jsonl", SFT, seed=0)) == [{"text": "not mine"}]  # asked for by its name
    (run / "config.yaml").unlink()  # then it is a folder like any other
    assert len(read_rows(run, SFT, seed=0)) == 4


def test_weights(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(100))))

    def read(weight: float, seed: int = 0) -> list[int]:
        return [int(row["text"]) for row in read_rows([{"path": path, "weight": weight}], ["text"], seed=seed)]

    assert read(1) == list(range(100))
    assert read(2) == [i for i in range(100) for _ in range(2)]
    half = read(0.5)
    assert len(half) == 50 == len(set(half))
    assert half == read(0.5) != read(0.5, seed=1)
    more = read(2.3)
    assert len(more) == 230
    assert {more.count(i) for i in range(100)} == {2, 3}


def test_two_sources_and_objects_with_attributes(tmp_path: Path) -> None:
    from ft_core.config import DataSource

    one, two = jsonl(tmp_path / "1.jsonl", {"text": "a"}), jsonl(tmp_path / "2.jsonl", {"text": "b", "prompt": 1})
    sources = [DataSource(path=str(one), weight=2), DataSource(path=str(two), format="text")]
    assert [row["text"] for row in read_rows(sources, ["text"], seed=0)] == ["a", "a", "b"]


def test_columns_that_fit_several_formats() -> None:
    both = ["prompt", "chosen", "rejected", "messages", "text"]
    assert recognise(both) == "preference"
    assert recognise(both, ["messages", "text"]) == "messages"
    with pytest.raises(DataError, match=r"'question', 'answer' fit no format.*'prompt', 'completion'.*'text'"):
        recognise(["question", "answer"])


def test_conversations_in_their_variants(tmp_path: Path) -> None:
    given = [
        {"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Add."},
    ]
    system = {"role": "system", "content": "Add."}
    rows = read_rows(jsonl(tmp_path / "a.jsonl", *given), ["sharegpt"], seed=0)
    assert [row["messages"] for row in rows] == [[ASK, ANSWER], [system, ASK, ANSWER]]
    parts = {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}
    rows = read_rows(jsonl(tmp_path / "b.jsonl", {"messages": [parts, ANSWER]}), ["messages"], seed=0)
    assert rows[0] == {"messages": [ASK, ANSWER]}
    prompted = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}
    rows = read_rows(jsonl(tmp_path / "c.jsonl", prompted), ["prompt-completion"], seed=0)
    assert rows[0] == {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]}


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]},
        {"prompt": "2+2?", "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]},
        {"prompt": [ASK], "chosen": "4", "rejected": "5"},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
        {"prompt": "2+2?", "chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
        {"prompt": [ASK], "chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "5"}]},
    ],
)
def test_preferences_in_messages(tmp_path: Path, given: dict[str, Any]) -> None:
    rows = read_rows(jsonl(tmp_path / "a.jsonl", given), ["preference"], seed=0)
    assert rows[0] == {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "5"}]}


BAD_LINES = {
    "broken": ('{"text": "a"', r"line 3: broken JSON: Expecting ',' delimiter at column 13$"),
    "no object": ("[1]", r"line 3: a row must be a JSON object with columns, not list"),
    "missing column": ('{"txt": "a"}', r"line 3: lacks 'text', which the text format needs \(found 'txt'\)"),
    "wrong type": ('{"text": 5}', r"line 3: text must be a string, not a number"),
    "null": ('{"text": null}', r"line 3: text must be a string, not null"),
    "surrogate": ('{"text": "\\ud800"}', r"line 3: holds half of a surrogate pair"),
    "too deep": ('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}", r"line 3: JSON that cannot be read"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, expected = BAD_LINES[case]
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"train\.jsonl, " + expected) as error:
        read_rows(path, SFT, seed=0)
    message(error)


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown role": ({"messages": [{"role": "wizard", "content": ""}]}, r"unknown role 'wizard'; allowed are system, "),
    "no role": ({"messages": [{"content": ""}]}, r"messages\[0\] has no 'role' \(found 'content'\)"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
    "content": (
        {"messages": [{"role": "user", "content": 3}]},
        r"messages\[0\]'s content must be a string, not a numb",
    ),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"part of type 'image'"),
    "no answer": ({"messages": [ASK]}, r"messages has no assistant turn \(roles: user\)"),
    "no turns": ({"messages": []}, r"messages is empty"),
    "no list": ({"messages": "hello"}, r"messages must be a list of messages, not a string"),
    "no message": ({"messages": ["hello"]}, r"messages\[0\] must be an object with 'role' and 'content', not a string"),
    "weight": ({"messages": [ASK, {**ANSWER, "weight": 2}]}, r"weight must be 0 or 1, not 2"),
    "tools": ({"messages": [ASK, ANSWER], "tools": "{"}, r"tools is not valid JSON"),
    "speaker": (
        {"conversations": [{"from": "robot", "value": ""}]},
        r"unknown role 'robot'; allowed are system, human",
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "hi"}]}, r"conversations has no assistant turn"),
    "mixed": ({"prompt": "a", "completion": [ANSWER]}, r"both be strings or both be lists.*a string and a list"),
    "alpaca": ({"instruction": ["a"], "output": "b"}, r"instruction must be a string, not a list"),
    "chosen": (
        {"chosen": [ANSWER, ASK], "rejected": [ANSWER]},
        r"chosen must end with an assistant turn, not with 'us",
    ),
    "label": (
        {"prompt": "a", "completion": "b", "label": "good"},
        r"label must be true \(a wanted answer\) or false, no",
    ),
    "empty prompt": ({"prompt": " "}, r"prompt is empty"),
    "asked by nobody": ({"prompt": []}, r"prompt is empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, case: str) -> None:
    row, expected = BAD_ROWS[case]
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: .*" + expected) as error:
        read_rows(jsonl(tmp_path / "a.jsonl", row), tuple(FORMATS), seed=0)
    message(error)


def test_rows_without_the_needed_columns_show_those_found(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"line 1: columns 'question', 'answer' fit no format; needed are 'messages'"):
        read_rows(path, SFT, seed=0)
    with pytest.raises(
        DataError, match=r"lacks 'instruction', 'output', which the alpaca format needs \(found 'question', 'answer'\)"
    ):
        read_rows([{"path": path, "format": "alpaca"}], ["alpaca"], seed=0)


def test_a_format_that_the_method_cannot_train_on(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"in the text format, which this method cannot.*'chosen', 'rejected' \(prefer"):
        read_rows(path, ["preference"], seed=0)
    with pytest.raises(DataError, match=r"no format 'jsonl'; allowed are preference, labelled, m"):
        read_rows([{"path": path, "format": "jsonl"}], SFT, seed=0)


def test_files_that_are_missing_empty_or_no_data(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file or folder \(did you mean '.*train\.jsonl'\?\)"):
        read_rows(tmp_path / "trian.jsonl", SFT, seed=0)
    with pytest.raises(DataError, match=r"there is no folder '.*nowhere'"):
        read_rows(tmp_path / "nowhere" / "train.jsonl", SFT, seed=0)
    for name in ("empty.jsonl", "empty.json", "empty.csv", "empty.txt"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=rf"{name}: the file is empty"):
            read_rows(tmp_path / name, SFT, seed=0)
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(DataError, match=r"data files end in \.jsonl, \.json, \.csv, \.parquet, \.txt, not in '\.docx'"):
        read_rows(tmp_path / "notes.docx", SFT, seed=0)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare: the folder has no data files"):
        read_rows(tmp_path / "bare", SFT, seed=0)
    with pytest.raises(DataError, match="names no source"):
        read_rows([], SFT, seed=0)


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: is not UTF-8 \(byte 0xe9 at 13\); convert it") as error:
        read_rows(tmp_path / "latin.jsonl", SFT, seed=0)
    message(error)
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=r"wide\.txt: is not UTF-8 \(it looks like UTF-16\)"):
        read_rows(tmp_path / "wide.txt", SFT, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,text\na,b\n", r"line 1: the header names a column twice: text, text"),
        ("a.csv", 'prompt,completion\n"a\nb",c\nd\n', r"line 4: has 1 cells where the header names 2 columns"),
        ("a.csv", 'text\n"a\n', r"line 2: broken csv"),
        (
            "a.csv",
            "prompt;completion\na;b\n",
            r"line 1: the header 'prompt;completion' is one column, as if ';' separated the cells: separate them by",
        ),
        ("a.csv", "prompt\tcompletion\na\tb\n", r"line 1: .* as if '\\t' separated the cells"),
        ("a.csv", "messages\nhello\n", r"line 2, column 'messages': broken JSON"),
        ("a.json", '{"rows":\n []}', r"must hold a list of rows or one row a line, not one object"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', r"a\.json: broken JSON: .* at line 2 column 9"),
        ("a.json", '{"text": "a"}\n{"text": }\n', r"line 2: broken JSON"),
        ("a.json", "5", r"must hold a list of rows, not int"),
        ("a.parquet", "PAR1 this is none", r"is no whole parquet file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected) as error:
        read_rows(tmp_path / name, SFT, seed=0)
    assert name in message(error)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", True])
def test_weights_that_are_none(tmp_path: Path, weight: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="weight must be a number above 0"):
        read_rows([{"path": path, "weight": weight}], SFT, seed=0)
    with pytest.raises(DataError, match=r"weight 0\.1 leaves none of its rows"):
        read_rows([{"path": path, "weight": 0.1}], SFT, seed=0)


def test_a_hub_name_without_the_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = r"nobody/nothing: no such file .* cannot be loaded as a Hub data set: the Hub is not reached \(.*offline"
    with pytest.raises(DataError, match=expected) as error:
        read_rows("nobody/nothing", SFT, seed=0)
    message(error)


def test_a_split_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself is out of reach here: what it and the library are asked for is looked at."""
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    def loaded(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split))
        rows = datasets.Dataset.from_list([{"text": split}])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    for source, wanted in {
        "owner/name": ("owner/name", None, "train"),
        "owner/name:validation": ("owner/name", None, "validation"),
        "name:en-1.0:test": ("name", "en-1.0", "test"),
        "owner/name:train[:10%]": ("owner/name", None, "train[:10%]"),
    }.items():
        asked.clear()
        assert list(read_rows(source, SFT, seed=0)) == [{"text": wanted[2]}]
        assert asked == [wanted[0], wanted]
        assert list(RowStream(source, SFT)) == [{"text": wanted[2]}]
    asked.clear()
    for drive in ("C:\\data\\train", "C:/data/train", "C:train.jsonl", "name:", "owner/name::test"):
        with pytest.raises(DataError, match=r"no such file or folder"):
            read_rows(drive, SFT, seed=0)
    jsonl(tmp_path / "name:test", {"text": "a"}).rename(tmp_path / "name:test.jsonl")
    assert list(read_rows("name:test.jsonl", SFT, seed=0)) == [{"text": "a"}]
    assert asked == []


@pytest.mark.parametrize("stream", [False, True])
def test_recordings_of_a_hub_data_set_are_not_decoded(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has what the Hub holds: the bytes, here of no audio at all, which decoding would refuse."""
    import datasets
    import huggingface_hub

    made = datasets.Dataset.from_list([{"audio": {"bytes": b"sound", "path": "a.wav"}, "text": "hello"}])
    made = made.cast_column("audio", datasets.Audio(sampling_rate=16_000))

    def loaded(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        return made.to_iterable_dataset() if streaming else made

    def form(row: Any, format: Any, folder: Path | None) -> dict[str, Any]:
        assert folder is None
        return {"text": row["text"], "held": row["audio"]["bytes"].decode(), "path": row["audio"]["path"]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", loaded)
    rows = (
        RowStream("owner/name", ["text"], form=form) if stream else read_rows("owner/name", ["text"], seed=0, form=form)
    )
    assert list(rows) == [{"text": "hello", "held": "sound", "path": "a.wav"}]


def test_metadata_as_in_ljspeech(tmp_path: Path) -> None:
    """No header, no quotes, | between the cells: only beside a folder of wavs, any other such file is still refused."""
    lines = 'LJ001-0001|In "1837", he said|In eighteen thirty-seven, he said\nLJ001-0002|Yes.\n\n'
    (tmp_path / "metadata.csv").write_text(lines)
    with pytest.raises(DataError, match=r"metadata\.csv, line 2"):
        read_rows(tmp_path, ["text"], seed=0)
    (tmp_path / "wavs").mkdir()
    for name in ("LJ001-0001", "a"):
        (tmp_path / "wavs" / f"{name}.wav").touch()

    def form(row: Any, format: Any, folder: Path | None) -> dict[str, Any]:
        assert folder == tmp_path
        return dict(row)

    assert list(read_rows(tmp_path, ["text"], seed=0, form=form)) == [
        {
            "audio": "wavs/LJ001-0001.wav",
            "text": 'In "1837", he said',
            "normalized_text": "In eighteen thirty-seven, he said",
        },
        {"audio": "wavs/LJ001-0002.wav", "text": "Yes."},
    ]
    (tmp_path / "metadata.csv").write_text("a|b|c|d\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 1: has 4 cells; beside a folder wavs, as in LJSpeech"):
        read_rows(tmp_path, ["text"], seed=0, form=form)
    (tmp_path / "metadata.csv").write_text("file_name|text\na|yes\n")
    with pytest.raises(DataError, match=r"line 1: the header 'file_name\|text' is one column"):
        read_rows(tmp_path, ["text"], seed=0, form=form)
    (tmp_path / "metadata.csv").write_text("file_name,text|notes\nwavs/a.wav,a | b\n")
    with pytest.raises(DataError, match=r"line 2: columns 'file_name', 'text\|notes' fit no format"):
        read_rows(tmp_path, ["text"], seed=0, form=form)
    (tmp_path / "metadata.csv").write_text("file_name,text\nwavs/a.wav,a | b\n")
    assert list(read_rows(tmp_path, ["text"], seed=0, form=form)) == [{"file_name": "wavs/a.wav", "text": "a | b"}]


def test_rows_of_a_dataset_are_read_like_those_of_a_file(tmp_path: Path) -> None:
    # What the Hub gives is a datasets.Dataset; here one that datasets itself has loaded from a folder.
    import datasets

    from ft_core.data.reading import _read_one

    given, normal = EXAMPLES["messages"]
    loaded = datasets.Dataset.from_list([given, given])
    assert Rows.of_encoded(_read_one("owner/name", enumerate(loaded, 1), None, SFT)) == Rows([normal, normal])
    with pytest.raises(DataError, match="owner/name, row 1: is in the messages format"):
        list(_read_one("owner/name", enumerate(loaded, 1), None, ["preference"]))


def test_a_modality_names_columns_and_may_know_the_configuration(tmp_path: Path) -> None:
    from ft_core.config import TrainConfig
    from ft_core.training.modality import RowForm

    def columns(row: Any) -> Any:
        return {"text": row["transcript"]} if "transcript" in row else row

    def knows(row: Any, format: Any, folder: Any, *, config: Any) -> dict[str, Any]:
        return {**format.normalise(row), "model": config.model, "beside": folder.name}

    def plain(row: Any, format: Any, folder: Any) -> dict[str, Any]:
        return {**format.normalise(row), "beside": folder.name}

    path = jsonl(tmp_path / "a.jsonl", {"transcript": "x"}, {"text": "y"})
    config = TrainConfig(model="m", data=str(path))
    for rows, more in ((knows, {"model": "m"}), (plain, {})):
        read = list(read_rows(str(path), ["text"], seed=0, form=RowForm(rows, columns, config)))
        assert read == [{"text": text, **more, "beside": tmp_path.name} for text in "xy"]
    with pytest.raises(DataError, match="columns 'transcript' fit no format"):
        read_rows(str(path), ["text"], seed=0, form=RowForm(plain, None, config))
