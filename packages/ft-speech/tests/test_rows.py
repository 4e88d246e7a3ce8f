"""Rows as data sets have them, to one normal form, by the modalities' own functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ft_core.data import read_rows
from ft_core.errors import DataError
from ft_core.plugins.registry import registry
from ft_core.plugins.specs import ModalitySpec, resolve
from ft_core.training.modality import RowForm
from ft_speech.references import open_row

# of sft, which trains both modalities
FORMATS = ("messages", "sharegpt", "prompt-completion", "alpaca", "text")
RATE = 16_000


def read(source: Path, task: str) -> list[dict[str, Any]]:
    spec = registry().get(ModalitySpec, task)
    assert spec.rows is not None
    assert spec.columns is not None
    form = RowForm(resolve(spec.rows), resolve(spec.columns), None)  # type: ignore[arg-type]
    return list(read_rows(str(source), FORMATS, seed=0, form=form))


def one(folder: Path, row: dict[str, Any], task: str = "stt") -> dict[str, Any]:
    """The row as it is read of a file, which is then read as what it has become."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (made,) = read(path, task)
    path.write_text(json.dumps(made) + "\n")
    assert read(path, task) == [made]
    return made


def line(folder: Path, row: dict[str, Any], task: str = "stt") -> str:
    with pytest.raises(DataError) as error:
        one(folder, row, task)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{folder / 'rows.jsonl'}, line 1: ")
    return said.partition("line 1: ")[2]


# -- recognition


@pytest.mark.parametrize(
    "row",
    [
        {"audio": "a.wav", "text": "hello"},
        {"path": "a.wav", "sentence": "hello", "up_votes": 2},  # Common Voice
        {"path": "elsewhere/a.wav", "audio": {"bytes": None, "path": "a.wav"}, "sentence": "hello"},
        {"file": "a.wav", "text": "hello", "speaker_id": 3, "id": "1-2"},  # LibriSpeech
        {"audio": "a.wav", "transcription": "hello", "raw_transcription": "Hello."},  # FLEURS
        {"file_name": "a.wav", "transcript": "hello"},  # audiofolder
        {"audio_filepath": "a.wav", "duration": 1.0, "text": "hello"},  # NeMo
        {"audio": "a.wav", "normalized_text": "hello", "raw_text": "Hello."},  # VoxPopuli
        {"audio": "a.wav", "text": None, "transcript_text": "hello"},
        {"audio": "a.wav", "text": "hello", "prompt": "say", "completion": "no", "messages": []},
    ],
)
def test_columns_of_data_sets(row: dict[str, Any], tmp_path: Path) -> None:
    assert one(tmp_path, row) == {"audio": str(tmp_path / "a.wav"), "text": "hello"}


def test_everything_that_a_row_may_say(tmp_path: Path) -> None:
    segments = [{"start": 0, "end": 1.5, "text": " one"}, {"start": 1.5, "end": 2, "text": " two"}]
    row = {"audio": "a.wav", "text": "", "language": "fr", "task": "translate", "start": 3, "end": 5}
    made = one(tmp_path, {**row, "segments": segments, "tags": ["x"]})
    assert made == {
        **row, "audio": str(tmp_path / "a.wav"), "start": 3.0, "end": 5.0,
        "segments": [{"start": 0.0, "end": 1.5, "text": " one"}, {"start": 1.5, "end": 2.0, "text": " two"}],
    }  # fmt: skip
    del row["text"]
    assert one(tmp_path, {**row, "segments": segments})["text"] == "one two"
    assert one(tmp_path, {"audio": "a.wav", "text": "", "segments": None, "start": None}) == {
        "audio": str(tmp_path / "a.wav"), "text": "",
    }  # fmt: skip


def test_stretches_as_nemo_has_them(tmp_path: Path) -> None:
    made = one(tmp_path, {"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.25, "text": "a"})
    assert (made["start"], made["end"]) == (1.5, 3.75)
    assert "end" not in one(tmp_path, {"audio_filepath": "a.wav", "offset": 1.5, "text": "a"})


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("en", "en"), ("EN-us", "en"), ("zh_CN", "zh"), ("yue", "yue"), ("French", "fr"), ("castilian", "es"),
        ("cmn_hans_cn", "cmn"), (" de ", "de"), ("Haitian Creole", "ht"),
    ],
)  # fmt: skip
def test_languages(given: str, code: str, tmp_path: Path) -> None:
    for column in ("language", "lang", "locale"):
        assert one(tmp_path, {"audio": "a.wav", "text": "a", column: given})["language"] == code
    assert "language" not in one(tmp_path, {"audio": "a.wav", "text": "a", "language": " "})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "has no recording: it needs one of the columns audio, file_name, audio_filepath, audio_path, "
         "file, path (found 'text')"),
        ({"audio": "a.wav"}, "has no text: it needs one of the columns text, sentence, transcription, transcript, "
         "transcript_text, normalized_text (found 'audio')"),
        ({"audio": "a.wav", "text": 3}, "text must be text, not a int"),
        ({"audio": "http://x/a.wav", "text": "a"}, "audio is a URL, http://x/a.wav, which is not fetched"),
        ({"audio": 3, "text": "a"}, "audio must be a path"),
        ({"audio": "a.wav", "text": "a", "language": 4}, "language must be a language's code, such as en, not a int"),
        ({"audio": "a.wav", "text": "a", "language": "Klingon"}, "language is 'Klingon', neither a code, such as en"),
        ({"audio": "a.wav", "text": "a", "task": "asr"}, "task must be transcribe or translate, not 'asr'"),
        ({"audio": "a.wav", "text": "a", "start": "0:01"}, "start must be a number of seconds of at least 0, not '0:"),
        ({"audio": "a.wav", "text": "a", "start": -1}, "start must be a number of seconds of at least 0, not -1"),
        ({"audio": "a.wav", "text": "a", "end": True}, "end must be a number of seconds of at least 0, not True"),
        ({"audio": "a.wav", "text": "a", "end": [1]}, "end must be a number of seconds of at least 0, not a list"),
        ({"audio": "a.wav", "text": "a", "start": 2, "end": 2}, "end is 2 s: a stretch ends after its start, 2 s"),
        ({"audio": "a.wav", "text": "a", "offset": 2, "duration": 0}, "duration is 0: a stretch ends after its start"),
        ({"audio": "a.wav", "text": "a", "offset": 2, "end": 3}, "has an offset and a start or end"),
        ({"audio": "a.wav", "text": "a", "segments": "["}, "segments is not valid JSON"),
        ({"audio": "a.wav", "text": "a", "segments": {}}, "segments must be a list of objects"),
        ({"audio": "a.wav", "text": "a", "segments": [1]}, "segments[0] must be an object with"),
        ({"audio": "a.wav", "text": "a", "segments": [{"start": 0, "end": 1}]}, "segments[0]'s text must be text"),
        ({"audio": "a.wav", "text": "a", "segments": [{"end": 1, "text": ""}]}, "segments[0]'s start must be a number"),
        ({"audio": "a.wav", "text": "a", "segments": [{"start": 2, "end": 1, "text": ""}]},
         "segments[0] ends at 1 s, but starts at 2 s: segments are in the order of time"),
        ({"audio": "a.wav", "text": "a",
          "segments": [{"start": 2, "end": 3, "text": ""}, {"start": 1, "end": 3, "text": ""}]},
         "segments[1] starts at 1 s, but the one before it starts at 2 s"),
        ({"audio": "a.wav", "text": "a", "start": 1, "end": 2, "segments": [{"start": 0, "end": 1.6, "text": ""}]},
         "segments[0] ends at 1.6 s of a stretch of 1 s"),
    ],
)  # fmt: skip
def test_what_a_recogniser_cannot_learn_from(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert line(tmp_path, row).startswith(expected)


# -- synthesis


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"text": "hello", "audio": "a.wav"}, {}),
        ({"text": "hello", "audio": "a.wav", "voice": " tara ", "style": "sad"}, {"voice": "tara", "style": "sad"}),
        ({"transcript": "hello", "file": "a.wav", "speaker_id": 17}, {"voice": "17"}),
        ({"text": "no", "normalized_text": "hello", "audio": "a.wav", "speaker": "", "style": None}, {}),
    ],
)  # fmt: skip
def test_rows_of_speakers(row: dict[str, Any], more: dict[str, str], tmp_path: Path) -> None:
    assert one(tmp_path, row, "tts") == {"text": "hello", "audio": str(tmp_path / "a.wav"), **more}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "has no recording"),
        ({"audio": "a.wav", "style": "b"}, "has no text"),
        ({"audio": "a.wav", "text": " "}, "text is empty, so there is nothing to be spoken"),
        ({"audio": "a.wav", "text": "a", "voice": ["b"]}, "voice must be text or a whole number, not a list"),
        ({"audio": "a.wav", "text": "a", "style": True}, "style must be text or a whole number, not a bool"),
        ({"audio": "a.wav", "text": "a", "start": 2}, "start says a stretch of a recording, which task: tts does not"),
    ],
)
def test_what_a_speaker_cannot_learn_from(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert line(tmp_path, row, "tts").startswith(expected)


# -- folders and other files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of recordings in a folder of their own, whose rows stand beside them."""
    from ft_speech import write_audio

    (tmp_path / "wavs").mkdir()
    for number in (1, 2):
        write_audio(tmp_path / "wavs" / f"{number}.wav", np.full(RATE, number / 4), RATE)
    return tmp_path


def values(rows: list[dict[str, Any]]) -> list[Any]:
    return [(float(open_row(row, RATE).max()), row["text"]) for row in rows]


WANTED = [(pytest.approx(0.25, abs=2**-15), "one, two"), (pytest.approx(0.5, abs=2**-15), 'three "3"')]


@pytest.mark.parametrize("task", ["stt", "tts"])
def test_audiofolder(task: str, folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,transcription\nwavs/1.wav,"one, two"\nwavs/2.wav,"three ""3"""\n')
    assert values(read(folder, task)) == WANTED
    (folder / "metadata.csv").unlink()
    (folder / "wavs" / "metadata.jsonl").write_text(
        '{"file_name": "1.wav", "text": "one, two"}\n{"file_name": "2.wav", "text": "three \\"3\\""}\n'
    )
    assert values(read(folder, task)) == WANTED


@pytest.mark.parametrize("task", ["stt", "tts"])
def test_ljspeech(task: str, folder: Path) -> None:
    (folder / "metadata.csv").write_text('1|one, two|one, two\n2|three "3"|three\n')
    second = WANTED[1] if task == "stt" else (WANTED[1][0], "three")  # a speaker learns the text as it is read out
    assert values(read(folder, task)) == [WANTED[0], second]


def test_csv_has_text_alone(folder: Path) -> None:
    (folder / "rows.csv").write_text(
        "audio,text,start,end,language,segments\n"
        'wavs/1.wav,a,0.25,0.75,en,"[{""start"": 0, ""end"": 0.5, ""text"": ""a""}]"\n'
        "wavs/2.wav,b,,,,\n"
    )
    first, second = read(folder / "rows.csv", "stt")
    assert len(open_row(first)) == RATE // 2
    assert first["segments"] == [{"start": 0.0, "end": 0.5, "text": "a"}]
    assert second == {"audio": str(folder / "wavs" / "2.wav"), "text": "b"}


def test_parquet_with_recordings_in_it(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = [(folder / "wavs" / f"{number}.wav").read_bytes() for number in (1, 2)]
    table = {"audio": [{"bytes": data[0], "path": "x.wav"}, {"bytes": data[1], "path": None}]}
    pyarrow.parquet.write_table(pyarrow.table({**table, "text": ["one, two", 'three "3"']}), folder / "a.parquet")
    assert values(read(folder / "a.parquet", "stt")) == WANTED


def test_little_of_a_long_recording_is_read(tmp_path: Path) -> None:
    """Silence of ten minutes is a few kilobytes of flac."""
    from ft_speech import write_audio
    from ft_speech.speaking.recordings import read_recording

    write_audio(tmp_path / "long.flac", np.zeros(600 * RATE, np.float32), RATE)
    read = read_recording({"audio": str(tmp_path / "long.flac")}, RATE, None, most=5)
    assert 5 * RATE < len(read.samples) <= 6 * RATE
    spoken = np.zeros(600 * RATE, np.float32)
    spoken[:RATE] = spoken[-RATE:] = 0.5  # trimmed, what is read of it would pass for a second
    write_audio(tmp_path / "both.flac", spoken, RATE)
    assert len(read_recording({"audio": str(tmp_path / "both.flac")}, RATE, 40.0, most=5).samples) > 60 * RATE
    write_audio(tmp_path / "short.flac", np.full(2 * RATE, 0.5, np.float32), RATE)
    assert len(read_recording({"audio": str(tmp_path / "short.flac")}, RATE, None, most=5).samples) == 2 * RATE
