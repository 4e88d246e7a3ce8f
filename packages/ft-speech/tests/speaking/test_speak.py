"""``ft speak``: what is written where, and what is refused."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from songs import Outcome, Songs

from ft_core.errors import DataError
from ft_speech.audio import AudioError
from ft_speech.speaking.speaker import open_speaker, speak
from ft_speech.speaking.writing import as_sixteen_bits, sink

Call = Callable[..., Outcome]


def test_whatever_a_model_says_is_sound(songs: Songs) -> None:
    """A model that has learnt nothing speaks whole frames to the end; pieces are those of the whole."""
    from ft_core.training import train

    run = train(songs.config(songs.folder / "untrained"), say=lambda line: None).run
    speaker: Any = open_speaker(str(run))
    pieces = list(speaker.speak("one two", temperature=1.5, top_p=1.0, seed=3, max_seconds=1.0))
    whole = np.concatenate(pieces)
    assert np.isfinite(whole).all()
    assert len(whole) % speaker.processor.codec.frame_samples == 0
    assert len(whole) <= 16_000
    again, rate = speak(speaker, "one two", temperature=1.5, top_p=1.0, seed=3, max_seconds=1.0)
    assert rate == 16_000
    assert np.array_equal(again, whole)
    assert not np.array_equal(speak(speaker, "one two", temperature=1.5, seed=4, max_seconds=1.0)[0], whole)
    assert list(speaker.speak("one", max_seconds=0.05))
    assert speaker.cut
    with pytest.raises(DataError, match="leaves none of the model's 512 positions"):
        list(speaker.speak("one " * 600))


def test_files(singer: Path, tmp_path: Path, ft: Call) -> None:
    out = tmp_path / "a.wav"
    made = ft("speak", "one two", "--model", singer, "--voice", "ann", "--out", out)
    assert made.code == 0, made.err
    assert "s of speech in" in made.out
    samples, rate = soundfile.read(out)
    assert rate == 16_000
    assert 0.2 < len(samples) / rate < 1.5
    again = ft("speak", "one", "--model", singer, "--out", out)
    assert again.code == 2
    assert "is there already: give another --out, or --overwrite" in again.err
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    made = ft("speak", "--file", tmp_path / "text.txt", "--model", singer, "--out", out, "--stream", "--overwrite")
    assert made.code == 0, made.err
    flac = ft("speak", "one two", "--model", singer, "--voice", "ann", "--out", tmp_path / "a.flac")
    assert flac.code == 0
    assert np.abs(soundfile.read(tmp_path / "a.flac")[0] - samples).max() < 1.01 * 2**-15  # they round differently
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.flac", "a.wav", "text.txt"]


def test_stdout(singer: Path, ft: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two"))
    wav = ft("speak", "-", "--model", singer, "--out", "-").out.encode("latin-1")
    raw = ft("speak", "one two", "--model", singer, "--out", "-", "--raw").out.encode("latin-1")
    assert wav[44:] == raw
    samples, rate = soundfile.read(io.BytesIO(wav))
    assert (rate, len(samples)) == (16_000, len(raw) // 2)


def test_a_model_folder_says_its_codec(singer: Path, songs: Songs, tmp_path: Path, ft: Call) -> None:
    assert ft("speak", "one", "--model", singer / "model", "--out", tmp_path / "a.wav").code == 0
    refused = ft("speak", "one", "--model", songs.base, "--out", tmp_path / "b.wav")
    assert refused.code == 2
    assert "does not say what codec its tokens are of: give --codec and --codec-model" in refused.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give a TEXT, or a file of it with --file"),
        (("one", "--file", "a.txt"), "not both"),
        ((" ",), "nothing to be spoken"),
        (("--file", "gone.txt"), "no text file gone.txt"),
        (("one", "--out", "a.aac"), "the ending says the format"),
        (("one", "--out", "a.mp3", "--stream"), "a file that grows is a .wav"),
        (("one", "--out", "gone/a.wav"), "no folder gone"),
        (("one", "--raw"), "--raw is of stdout"),
        (("one", "--max-seconds", "0"), "allowed: a number above 0"),
        (("one", "--model", "gone/run"), "gone/run"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], says: str, tmp_path: Path, ft: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ft("speak", *(() if "--out" in words else ("--out", "a.wav")), "--model", "runs/gone", *words)
    assert made.code == 2
    assert says in made.err
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with sink(path, 16_000) as write:
        write(np.full(100, 2, np.float32))
        assert not path.exists()
    before = path.read_bytes()
    assert soundfile.read(path)[0].max() == pytest.approx(1, abs=2**-14)  # cut off at full scale
    with pytest.raises(ZeroDivisionError), sink(path, 16_000) as write:
        write(np.zeros(100 // 0, np.float32))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="a model"), sink(path, 16_000):
        raise FileNotFoundError("a model")  # of the work, not of the file
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(AudioError, match="cannot be written"), sink(tmp_path / "gone" / "a.wav", 16_000):
        pass
    with sink(path, 16_000, grows=True) as write:
        write(np.zeros(100, np.float32))
        assert soundfile.info(path).frames == 100
        write(np.zeros(50, np.float32))
        assert soundfile.info(path).frames == 150
    assert as_sixteen_bits(np.array([1, -1, 0], np.float32)) == b"\xff\x7f\x01\x80\x00\x00"
