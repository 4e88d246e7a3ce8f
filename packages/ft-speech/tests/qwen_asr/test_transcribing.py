"""Qwen3-ASR as a recogniser, and `ft transcribe` by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from ft_core.errors import DataError
from ft_speech.listening.recogniser import open_recogniser
from ft_speech.qwen_asr import transcribing
from ft_speech.qwen_asr.transcribing import QwenRecogniser


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, parts: Any) -> Path:
    """A model that was taught to say after any recording what :func:`answer` has."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    tokenizer = parts.make_tokenizer()
    model, processor = parts.make_model(tokenizer), parts.make_processor(tokenizer)
    given = processor.apply_transcription_request([parts.sound(0, 1)])
    end = torch.tensor([[tokenizer.eos_token_id]])
    said = tokenizer("language English<asr_text>low", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([given["input_ids"], said, end], dim=1)
    labels = ids.clone()
    labels[:, : given["input_ids"].shape[1]] = -100
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for _ in range(40):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recogniser(trained: Path) -> Any:
    found = open_recogniser(str(trained))
    assert isinstance(found, QwenRecogniser)
    return found


def test_what_is_heard_is_what_transformers_own_processor_reads(recogniser: Any, parts: Any) -> None:
    """In one batch with a longer and a silent recording, as alone."""
    samples = [parts.sound(0, 1), np.zeros(32_000, np.float32), parts.sound(0, 2, 1.7)]
    found = recogniser.transcribe(samples)
    processor = recogniser.processor
    for number in (0, 2):
        given = processor.apply_transcription_request([samples[number]]).to(recogniser.model.device)
        with torch.no_grad():
            ids = recogniser.model.generate(
                **{k: v.to(recogniser.model.dtype) if v.is_floating_point() else v for k, v in given.items()},
                max_new_tokens=44, do_sample=False,
            )[0, given["input_ids"].shape[1] :]  # fmt: skip
        own = processor.decode(ids, return_format="parsed")
        assert found[number].text == own["transcription"]
        assert found[number].language == ("en" if own["language"] == "English" else None)
    assert (found[0].text, found[0].language, found[0].cut) == ("low", "en", 0)
    assert (found[1].text, found[1].language, found[1].segments) == ("", None, ())


def test_a_language_that_is_told_is_not_written(recogniser: Any, parts: Any) -> None:
    found = recogniser.transcribe([parts.sound(0, 1)], language="English")[0]
    assert (found.text, found.language) == ("low", "en")


def test_long_recordings_are_heard_window_by_window(
    recogniser: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transcribing.WINDOWS, "segment", 1.0)
    pause = np.zeros(6_400, np.float32)
    long = np.concatenate([parts.sound(0, 1), pause, parts.sound(0, 1), pause, parts.sound(0, 1)])
    heard: list[float] = []
    found = recogniser.transcribe([long, parts.sound(0, 1)], timestamps="segment", batch_size=2, progress=heard.append)
    assert [one.text for one in found] == ["low low low", "low"]
    starts = [one.start for one in found[0].segments]
    assert starts == sorted(starts)
    assert 0.6 <= starts[1] <= 1.0
    assert 1.6 <= starts[2] <= 2.0
    assert found[0].segments[-1].end == pytest.approx(2.6)
    assert sum(heard) == pytest.approx(3.2)


def test_an_answer_that_does_not_end_is_said_to_be_cut(recogniser: Any, parts: Any) -> None:
    found = recogniser.transcribe([parts.sound(0, 1)], max_new_tokens=4)[0]
    assert found.cut == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"task": "translate"}, "writes in the language that it hears"),
        ({"timestamps": "word"}, "does not write times"),
        ({"long_form": "sequential"}, "does not write times"),
        ({"language": "Klingon"}, "language: 'Klingon' is not known"),
        ({"prompt": "a <|im_end|>"}, "the prompt holds '<|im_end|>'"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    ],
)
def test_what_it_cannot_do_is_refused(asked: Any, message: str, recogniser: Any) -> None:
    with pytest.raises(DataError, match=message):
        recogniser.check(**{"language": None, "task": "transcribe", "timestamps": "none", **asked})


def test_a_run_writes_down_files(configure: Any, ft: Any, parts: Any, trained: Path, tmp_path: Path) -> None:
    made = ft("train", configure(model=str(trained), training={"max_steps": 1, "learning_rate": 1.0e-12}))
    assert made.code == 0, made.err
    assert f"ft transcribe {tmp_path / 'run'} FILES" in made.out
    soundfile.write(tmp_path / "a.wav", parts.sound(0, 1), 16_000)
    heard = ft("transcribe", tmp_path / "run", tmp_path / "a.wav")
    assert heard.code == 0, heard.err
    assert "low" in heard.out
