"""Sounds of held-out rows: formats, stretches, resampling, and what is made in the place of what cannot be read."""

from __future__ import annotations

import base64
import importlib.util
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ft_export.sounds import NotHeardError, make_sound, open_sound, sound_of


def _wav(samples: np.ndarray, rate: int, bits: int = 16) -> bytes:
    """A file of whole numbers; ``samples``: ``[samples, channels]``, -1 to 1."""
    file = io.BytesIO()
    scaled = np.round(samples * (2 ** (bits - 1) - 1)).astype(np.int64)
    with wave.open(file, "wb") as out:
        out.setnchannels(samples.shape[1])
        out.setsampwidth(bits // 8)
        out.setframerate(rate)
        if bits == 8:
            out.writeframes((scaled + 128).astype(np.uint8).tobytes())
        else:
            out.writeframes(b"".join(int(one).to_bytes(bits // 8, "little", signed=True) for one in scaled.flatten()))
    return file.getvalue()


def _tone(rate: int, seconds: float = 0.5, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("by", ["soundfile", "wave"])
def test_wav_of_all_widths_is_read_as_mono(bits: int, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "wave":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("soundfile")
    left, right = _tone(8000), _tone(8000, pitch=300)
    (tmp_path / "a.wav").write_bytes(_wav(np.stack([left, right], 1), 8000, bits))
    found = open_sound(str(tmp_path / "a.wav"), 8000)
    # half a step of rounding, and a step that the scale of whole numbers may be off by
    assert np.abs(found - (left + right) / 2).max() <= 1.5 * 2.0 ** (1 - bits) + 2.0**-22
    assert found.dtype == np.float32


def test_other_rates_are_resampled_and_stretches_cut(tmp_path: Path) -> None:
    url = "data:audio/wav;base64," + base64.b64encode(_wav(_tone(8000, 1.0)[:, None], 8000)).decode()
    found = open_sound(url, 16_000)
    assert found.shape == (16_000,)
    inside = slice(800, -800)  # a sound that is cut off rings at its ends
    assert np.abs(found - _tone(16_000, 1.0))[inside].max() < 1e-3
    down = open_sound(url, 4000)
    assert np.abs(down - _tone(4000, 1.0))[200:-200].max() < 1e-3
    part = open_sound(url, 8000, start=0.25, end=0.5)
    assert np.abs(part - _tone(8000, 1.0)[2000:4000]).max() < 1e-4
    assert open_sound(url, 8000, longest=0.1).shape == (800,)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "a"}, "a row without audio"),
        ({"audio": "https://example.invalid/a.wav"}, "a URL, which is not fetched"),
        ({"audio": "/nowhere/a.wav"}, "a file that cannot be opened"),
        ({"audio": "data:audio/wav;base64,!!"}, "a file that is no audio or is damaged"),
        ({"audio": "data:audio/wav;base64,UklGRgAAAAA="}, "a file that is no audio or is damaged"),
        ({"audio": "EMPTY"}, "an empty stretch"),
        ({"audio": "PAST", "start": 3.0}, "an empty stretch"),
        ({"audio": "FOLDER"}, "what is not a file"),
    ],
)
def test_a_sound_is_made_in_the_place_of_what_cannot_be_read(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    names = {"EMPTY": _wav(np.zeros((0, 1)), 8000), "PAST": _wav(_tone(8000)[:, None], 8000)}
    if row.get("audio") in names:
        (tmp_path / "a.wav").write_bytes(names[row["audio"]])
        row = {**row, "audio": str(tmp_path / "a.wav")}
    elif row.get("audio") == "FOLDER":
        row = {"audio": str(tmp_path)}
    sound = sound_of(row, 16_000, seed=3)
    assert sound.made == why
    assert sound.samples.shape == (5 * 16_000,)
    assert np.isfinite(sound.samples).all()
    assert 0.05 < np.abs(sound.samples).max() <= 1


def test_what_needs_soundfile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(60))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotHeardError, match="without soundfile"):
        open_sound(str(tmp_path / "a.flac"), 16_000)


def test_made_sounds_are_the_same_for_the_same_seed() -> None:
    one, again, other = (make_sound(1.0, 16_000, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
