"""Labels, batches and what is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny_whisper import RATE, spoken

from ft_core.config.load import load_config
from ft_core.errors import DataError, ModelError
from ft_speech.audio import read_audio
from ft_speech.listening.recordings import UnusableAudio
from ft_speech.listening.settings import AugmentSettings, SttSettings
from ft_speech.whisper.collating import WhisperCollator, collator
from ft_speech.whisper.documents import Examples, examples
from ft_speech.whisper.evaluating import _batches
from ft_speech.whisper.labels import Labels, labels_of


@pytest.fixture(scope="module")
def parts(whisper: Path) -> tuple[Any, Any]:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    return WhisperForConditionalGeneration.from_pretrained(whisper), WhisperProcessor.from_pretrained(whisper)


def labels(parts: tuple[Any, Any], **settings: Any) -> Labels:
    return labels_of(*parts, SttSettings(**settings), "tiny")


def test_labels_are_those_of_transformers_own_recipe(parts: tuple[Any, Any]) -> None:
    tokenizer = parts[1].tokenizer
    for language, task in (("en", "transcribe"), ("de", "translate")):
        tokenizer.set_prefix_tokens(language=language, task=task)
        start, *theirs = tokenizer(" so it is").input_ids  # the recipe's collator takes the start away too
        assert start == parts[0].config.decoder_start_token_id
        assert labels(parts)({"text": " so it is ", "language": language, "task": task}) == theirs
    # Chinese has no spaces, so that none is put before it; what is given for rows that say nothing
    tokenizer.set_prefix_tokens(language="zh", task="transcribe")
    assert labels(parts, language="Chinese")({"text": "你好"}) == tokenizer("你好").input_ids[1:]


def test_a_translation_is_english_whatever_is_spoken(parts: tuple[Any, Any]) -> None:
    tokenizer, known = parts[1].tokenizer, labels(parts, timestamps=True)
    tokenizer.set_prefix_tokens(language="zh", task="translate")
    row = {"text": "so it is", "language": "zh", "task": "translate"}
    assert known(row) == tokenizer(" so it is").input_ids[1:]
    text = tokenizer.decode(known({**row, "segments": [{"start": 0.0, "end": 0.4, "text": "so"}]}))
    assert " so" in text


def test_segments_become_timestamps(parts: tuple[Any, Any]) -> None:
    row = {"text": "low up", "language": "en", "segments": [
        {"start": 0.0, "end": 0.41, "text": "low"}, {"start": 0.5, "end": 0.9, "text": "up"},
    ]}  # fmt: skip
    made = labels(parts, timestamps=True)(row)
    text = parts[1].tokenizer.decode(made, decode_with_timestamps=True)
    assert text == "<|en|><|transcribe|><|0.00|> low<|0.42|><|0.50|> up<|0.90|><|endoftext|>".replace("0.42", "0.40")
    assert labels(parts)(row) == labels(parts)({"text": "low up", "language": "en"})
    row["segments"][1]["start"] = 0.2
    with pytest.raises(DataError, match=r"segments\[1\] is from 0.2 to 0.9 s, the one before ends at 0.41"):
        labels(parts, timestamps=True)(row)
    row["segments"][1] |= {"start": 0.5, "end": 1.5}
    with pytest.raises(DataError, match=r"segments\[1\] ends at 1.5 s: the model hears 1 s at a time"):
        labels(parts, timestamps=True)(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "has no language, and stt.language is not set"),
        ({"text": "a", "language": "Klingon"}, "language: 'Klingon' is none of the 3"),
        ({"text": "a <|de|> b", "language": "en"}, r"text holds '<\|de\|>', which means something else"),
    ],
)
def test_a_row_that_cannot_be_written(row: dict[str, Any], words: str, parts: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=words):
        labels(parts)(row)


def test_a_batch_is_what_transformers_makes(parts: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"audio": str(spoken(tmp_path / f"{n}.wav", words, n)), "text": "x" * n, "language": "en"}
            for n, words in enumerate((["low"], ["up", "down"]))]  # fmt: skip
    made = examples(rows, labels(parts), max_length=64, positions=64, varied=False)
    collate = WhisperCollator(parts[1].feature_extractor)
    batch = collate(made.rows)
    heard = [read_audio(row["audio"])[0] for row in rows]
    theirs = parts[1](heard, sampling_rate=RATE, return_tensors="np").input_features
    assert batch["input_features"].shape == (2, 80, 100)
    assert np.array_equal(batch["input_features"].numpy(), theirs)
    assert batch["labels"].tolist() == [[*made.rows[0]["labels"], -100, -100], made.rows[1]["labels"]]
    assert batch["tokens"] == made.tokens == 10
    # nothing of it is varied unless a row says so, and then it is other each time
    many = WhisperCollator(parts[1].feature_extractor, AugmentSettings(noise=[10, 10], spec=True, speed=[1.2, 1.2]))
    assert np.array_equal(many(made.rows)["input_features"], theirs)
    varied = [{**row, "varied": True} for row in made.rows]
    one, two = many(varied)["input_features"], many(varied)["input_features"]
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, theirs)


def test_what_is_left_out(parts: tuple[Any, Any], tmp_path: Path) -> None:
    good, bad = spoken(tmp_path / "good.wav", ["up"]), tmp_path / "bad.wav"
    bad.write_bytes(b"no audio")
    soundfile.write(tmp_path / "long.wav", np.zeros(2 * RATE), RATE)
    soundfile.write(tmp_path / "long.mp3", np.zeros(2 * RATE), RATE)
    whole = tmp_path / "long.wav"
    rows = [
        {"audio": str(good), "text": "up"},
        {"audio": str(bad), "text": "up"},
        {"audio": str(whole), "text": "up"},
        {"audio": str(tmp_path / "long.mp3"), "text": "up"},
        {"audio": str(whole), "text": "up", "start": 0.5, "end": 1.0},
        {"audio": str(good), "text": "up " * 40},
        {"audio": str(tmp_path / "none.wav"), "text": "up"},
    ]
    options: dict[str, Any] = {"max_length": 2048, "positions": 64, "varied": False}
    with pytest.raises(DataError, match=r"row 2: .*bad.wav: is no readable wav.*on_bad_audio: skip leaves such rows"):
        examples(rows, labels(parts, language="en"), **options)
    found = examples(rows, labels(parts, language="en", on_bad_audio="skip"), **options)
    assert found.numbers == [0, 4]
    assert (sorted(found.bad), found.too_long, found.overlong) == ([1, 6], 2, 1)
    assert found.seconds == pytest.approx(0.4 + 0.5)
    said = "\n".join(found.left_out("train", 1.0))
    assert "left out: train row 2: " in said
    assert "2 train rows whose recording are" not in said
    assert "2 train rows whose recordings are longer than the 1 s that the model hears at a time" in said
    assert "1 train row whose text is more than 64 tokens" in said


def test_segments_end_where_their_recording_does(parts: tuple[Any, Any], tmp_path: Path) -> None:
    """Give or take what times are rounded by; times that nobody asked for are not looked at."""
    soundfile.write(tmp_path / "a.wav", np.ones(RATE // 4) / 2, RATE)
    options: dict[str, Any] = {"max_length": 64, "positions": 64, "varied": False}

    def rows(end: float) -> list[dict[str, Any]]:
        row = {"audio": str(tmp_path / "a.wav"), "text": "up", "language": "en"}
        return [row, {**row, "segments": [{"start": 0.0, "end": end, "text": "up"}]}]

    known = labels(parts, timestamps=True)
    assert examples(rows(0.74), known, **options).numbers == [0, 1]
    with pytest.raises(DataError, match=r"^row 2: segments\[0\] ends at 0.76 s, and its recording at 0.25 s: mend"):
        examples(rows(0.76), known, **options)
    assert examples(rows(0.76), labels(parts), **options).numbers == [0, 1]


def test_a_recording_that_is_gone_when_its_batch_is_made(parts: tuple[Any, Any], tmp_path: Path) -> None:
    path = spoken(tmp_path / "a.wav", ["up"])
    found = examples([{"audio": str(path), "text": "a", "language": "en"}], labels(parts), max_length=64,
                     positions=64, varied=False)  # fmt: skip
    path.unlink()
    with pytest.raises(UnusableAudio, match=r"a.wav: cannot be read: No such file.*mend it, and go on"):
        WhisperCollator(parts[1].feature_extractor)(found.rows)


def test_a_feature_extractor_of_another_model(whisper: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer, WhisperFeatureExtractor

    from ft_core.config import TrainConfig
    from ft_core.models import find_model
    from ft_speech.whisper.loading import load_processor

    folder = tmp_path / "model"
    shutil.copytree(whisper, folder)
    WhisperFeatureExtractor(feature_size=128, chunk_length=1).save_pretrained(folder)
    config = TrainConfig(model=str(folder), data="a.jsonl", task="stt")
    with pytest.raises(ModelError, match="makes 128 x 100 features of a recording, its model takes 80 x 100"):
        load_processor(find_model(str(folder)), config, AutoTokenizer.from_pretrained(folder))


def test_silence_is_trimmed_for_training_and_for_measuring(parts: tuple[Any, Any], tmp_path: Path) -> None:
    """A row is heard as a file of its sound and the margin alone is, whose features are others than the whole's."""
    audio = np.zeros(RATE, np.float32)
    audio[RATE // 4 : RATE // 2] = 0.5 * np.sin(np.arange(RATE // 4))
    margin = RATE // 20
    soundfile.write(tmp_path / "whole.wav", audio, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "sound.wav", audio[RATE // 4 - margin : RATE // 2 + margin], RATE, subtype="FLOAT")
    whole, sound = ({"audio": str(tmp_path / f"{name}.wav"), "labels": [1]} for name in ("whole", "sound"))
    plain = WhisperCollator(parts[1].feature_extractor)
    expected = plain([sound])["input_features"]
    assert not np.array_equal(plain([whole])["input_features"], expected)
    path = tmp_path / "config.yaml"
    path.write_text("{model: tiny, task: stt, data: x.jsonl, output: run, stt: {trim_silence: 40}}")
    job: Any = SimpleNamespace(
        config=load_config(path), processor=parts[1], model=parts[0], arguments={"use_cpu": True}
    )
    assert np.array_equal(collator(job)([whole])["input_features"], expected)
    measured = next(_batches(job, Examples(rows=[whole])))
    assert np.array_equal(measured["input_features"], expected)
