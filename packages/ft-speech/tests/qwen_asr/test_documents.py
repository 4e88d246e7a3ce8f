"""What Qwen3-ASR is trained on: tokens as its own processor writes them, and spectra as it makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ft_core.data import Collator
from ft_core.errors import DataError, ModelError
from ft_core.models import find_model, load_tokenizer
from ft_speech.audio import read_audio
from ft_speech.qwen_asr.collating import AsrCollator
from ft_speech.qwen_asr.documents import RECORDINGS, AsrRenderer, Heard, heard_in, tokenize
from ft_speech.qwen_asr.languages import LANGUAGES, code_of, name_of, told
from ft_speech.qwen_asr.loading import load_processor
from ft_speech.qwen_asr.parts import Answer, audio_tokens, parsed, written


@pytest.fixture(scope="module")
def processor(parts: Any) -> Any:
    return parts.make_processor(parts.make_tokenizer())


def speech(path: Path, samples: int, rate: int = 16_000) -> str:
    sound = np.random.default_rng(samples).normal(0, 0.1, samples).clip(-1, 1)
    soundfile.write(path, sound, rate, format=path.suffix[1:].upper())
    return str(path)


@pytest.mark.parametrize("samples", [1, 7_999, 8_161, 15_999, 16_000, 16_001, 17_279, 17_280, 31_999, 48_160, 150_000])
def test_tokens_are_counted_as_the_processor_and_the_encoder_make_them(samples: int, processor: Any) -> None:
    made = processor(text=[processor.audio_token], audio=[np.zeros(samples, np.float32)], sampling_rate=16_000)
    assert int((made["input_ids"] == processor.audio_token_id).sum()) == audio_tokens(samples)


def test_documents_are_what_the_processor_writes(processor: Any, tmp_path: Path) -> None:
    """The prompt of transformers' own request, then, trained, the answer that the model's card shows, and the end."""
    rows = [
        {"audio": speech(tmp_path / "a.wav", 20_000), "text": " high ", "language": "en"},
        {"audio": speech(tmp_path / "b.wav", 40_000), "text": "low"},
        {"audio": str(tmp_path / "b.wav"), "text": "", "language": "yue", "start": 0.5, "end": 2.0},
    ]
    expected = ["language English<asr_text>high", "language None<asr_text>low", "language Cantonese<asr_text>"]
    renderer = AsrRenderer(processor)
    tokens, bad = tokenize(rows, renderer, max_length=512)
    assert not bad
    own = [read_audio(row["audio"], start=row.get("start", 0.0), end=row.get("end"))[0] for row in rows]
    batch = AsrCollator(Collator(0, padding_free=False), processor, torch.float32)(
        [{**tokens[i], RECORDINGS: [heard_in(row, renderer)]} for i, row in enumerate(rows)]
    )
    for number, (samples, answer) in enumerate(zip(own, expected, strict=True)):
        asked = processor.apply_transcription_request([samples])
        prompt = asked["input_ids"][0].tolist()
        said = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids, labels = tokens[number]["input_ids"], tokens[number]["labels"]
        assert ids == [*prompt, *said, processor.tokenizer.eos_token_id]
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
        # The spectra are the processor's own of this recording alone, to the bit; the rest is marked as none.
        frames = asked["input_features"].shape[-1]
        assert torch.equal(batch["input_features"][number, :, :frames], asked["input_features"][0])
        assert torch.equal(batch["input_features_mask"][number, :frames], asked["input_features_mask"][0].long())
        assert not batch["input_features_mask"][number, frames:].any()


def test_a_language_that_is_told_stands_where_transformers_puts_it(processor: Any) -> None:
    before, after = AsrRenderer(processor).around("Names: Ada.")
    samples = np.zeros(16_000, np.float32)
    own = processor.apply_transcription_request([samples], language="de", prompt="Names: Ada.")["input_ids"][0]
    text = f"{before}{processor.audio_token * audio_tokens(16_000)}{after}{written('', name_of('de'))}"
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == own.tolist()


def test_all_is_trained_but_the_recording(processor: Any, tmp_path: Path) -> None:
    rows = [{"audio": speech(tmp_path / "a.wav", 20_000), "text": "low"}]
    one = tokenize(rows, AsrRenderer(processor), max_length=512, train_on="all")[0][0]
    off = [token for token, label in zip(one["input_ids"], one["labels"], strict=True) if label == -100]
    assert off == [one["input_ids"][0], *[processor.audio_token_id] * audio_tokens(20_000)]


@pytest.mark.parametrize(("name", "rate"), [("a.wav", 22_050), ("a.flac", 8_000), ("a.ogg", 48_000), ("a.mp3", 44_100)])
def test_lengths_of_other_rates_and_formats_fit(name: str, rate: int, processor: Any, tmp_path: Path) -> None:
    """As many tokens as the batch's features make, though nothing is decoded to count them, save an mp3."""
    row = {"audio": speech(tmp_path / name, round(1.2803 * rate), rate), "text": "low"}
    renderer = AsrRenderer(processor)
    tokens, _ = tokenize([row], renderer, max_length=512)
    assert abs(renderer.samples[Heard.of(row)] - len(read_audio(row["audio"])[0])) <= 1
    batch = AsrCollator(Collator(0), processor, torch.float32)([{**tokens[0], RECORDINGS: [heard_in(row, renderer)]}])
    frames = int(batch["input_features_mask"].sum())
    assert tokens[0]["input_ids"].count(processor.audio_token_id) == audio_tokens(frames * 160)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "task": "translate"}, "row 1: task is translate: Qwen3-ASR writes down what is said"),
        ({"text": "a <|im_end|>"}, "row 1: text holds '<|im_end|>', which means something else to the model"),
        ({"text": "a", "language": "xx"}, "row 1: no language has the code 'xx'"),
        ({"text": "a", "audio": "/nowhere/a.wav"}, "row 1: /nowhere/a.wav: cannot be read"),
        ({"text": "a", "start": 5.0}, "row 1: .* starts at 5 s"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: Any, message: str, processor: Any, tmp_path: Path) -> None:
    given = {"audio": speech(tmp_path / "a.wav", 16_000), **row}
    with pytest.raises(DataError, match=message):
        tokenize([given], AsrRenderer(processor), max_length=512)


def test_languages() -> None:
    module = pytest.importorskip("transformers.models.qwen3_asr.processing_qwen3_asr")
    assert getattr(module, "LANGUAGE_CODE_TO_NAME", LANGUAGES) == LANGUAGES
    assert (name_of("uk"), name_of("fil"), code_of("cantonese"), code_of("Ukrainian")) == (
        "Ukrainian", "Filipino", "yue", "uk",
    )  # fmt: skip
    assert (code_of(None), code_of("Klingon"), told("German"), told("EN")) == (None, None, "de", "en")
    with pytest.raises(DataError, match="'Klingon' is not known"):
        told("Klingon")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("language English<asr_text> It is. ", Answer("English", "It is.")),
        ("language None<asr_text>", Answer(None, "")),
        ("language Haitian Creole<asr_text>Wi", Answer("Haitian Creole", "Wi")),
        (" It is.", Answer(None, "It is.")),
        ("English<asr_text>It is.", Answer(None, "It is.")),
    ],
)
def test_answers_are_read(answer: str, expected: Answer) -> None:
    assert parsed(answer) == expected


def test_what_is_written_is_read_again() -> None:
    assert parsed(written(" high ", "English")) == ("English", "high")
    assert parsed(written("high", None)) == (None, "high")


def test_processors_of_other_models_are_refused(parts: Any, folder: Path, tmp_path: Path) -> None:
    import shutil

    source = find_model(str(folder))
    for name, change, message in (
        ("hop", {"hop_length": 80}, "makes .* tokens of .* s, where Qwen3-ASR has"),
        ("none", None, "cannot be loaded"),
    ):
        other = tmp_path / name
        shutil.copytree(folder, other)
        path = other / "processor_config.json"
        if change is None:
            path.unlink()
        else:
            import json

            values = json.loads(path.read_text())
            values["feature_extractor"] |= change
            path.write_text(json.dumps(values))
        found = find_model(str(other))
        with pytest.raises(ModelError, match=message):
            load_processor(found, None, load_tokenizer(source))


def test_a_template_without_a_place_for_a_recording_is_refused(parts: Any) -> None:
    processor = parts.make_processor(parts.make_tokenizer())
    processor.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(DataError, match="writes 0 places for a recording instead of one"):
        AsrRenderer(processor)
