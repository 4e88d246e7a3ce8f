"""Odd and bad recordings as rows give them: as files, stretches, and within the data itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ft_speech.listening import recordings
from ft_speech.listening.recordings import looked_at
from ft_speech.references import open_row, reference_of

RATE = 16_000
TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)


def encode(audio: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.T, rate, format=format, subtype=subtype)
    return file.getvalue()


GOOD = {
    "stereo.wav": encode(np.stack([TONE, TONE])),
    "clipped.wav": encode(np.clip(4 * TONE, -1, 1)),
    "slow.wav": encode(TONE[::2], 8_000),
    "fast.flac": encode(np.repeat(TONE, 3), 48_000, "FLAC"),
    "mp3-by-another-name.wav": encode(TONE, format="MP3"),
    "silent.ogg": encode(np.zeros(2 * RATE), format="OGG"),
}
"""Two seconds each."""

BAD = {
    "empty.wav": (b"", "is empty"),
    "none.wav": (encode(np.zeros(0)), "holds no samples"),
    "cut.wav": (encode(TONE)[:9_000], "is cut short"),
    "cut.ogg": (encode(TONE, format="OGG")[:3_000], "is cut short"),
    "page.wav": (b"<html>not found</html>" * 50, "is no readable wav, flac, ogg or mp3 file"),
    "other.wav": (encode(TONE, format="AIFF"), "is a AIFF file"),
}
SEEN_WHOLE = {
    "nan.wav": (encode(np.where(np.arange(2 * RATE) == 9, np.nan, TONE), subtype="FLOAT"), "1 samples are NaN or"),
    "cut.flac": (encode(TONE, format="FLAC")[:9_000], "is cut short or damaged"),
}
"""What headers do not show."""


@pytest.mark.parametrize("name", GOOD)
def test_what_is_odd_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(GOOD[name])
    for reference in (reference_of(name, tmp_path), reference_of(GOOD[name])):
        for whole in (False, True):
            ((seconds, fault),) = looked_at([{"audio": reference}], whole=whole)
            assert (round(seconds, 3), fault) == (2, None)
        samples = open_row({"audio": reference})
        assert (samples.dtype, samples.shape) == (np.float32, (2 * RATE,))
        assert len(open_row({"audio": reference, "start": 0.5, "end": 1.25})) == 0.75 * RATE


@pytest.mark.parametrize("name", BAD | SEEN_WHOLE)
def test_what_is_bad_is_one_line_with_its_name(name: str, tmp_path: Path) -> None:
    data, said = (BAD | SEEN_WHOLE)[name]
    (tmp_path / name).write_bytes(data)
    for row, called in (
        ({"audio": reference_of(name, tmp_path)}, str(tmp_path / name)),
        ({"audio": reference_of(data)}, "a recording in the data itself"),
    ):
        for whole in (True,) if name in SEEN_WHOLE else (False, True):
            ((_, fault),) = looked_at([row], whole=whole)
            assert fault is not None
            assert fault.startswith(f"{called}: {said}")
            assert "\n" not in fault


@pytest.mark.parametrize("format", ["FLAC", "MP3", "WAV"])
def test_of_what_is_too_long_little_is_decoded(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of silence fit into a small file; its header says how long it is."""
    decoded: list[int] = []

    def spy(row: Any) -> Any:
        decoded.append(len(open_row(row)))
        return np.zeros(decoded[-1], np.float32)

    monkeypatch.setattr(recordings, "open_row", spy)
    reference = reference_of(encode(np.zeros(60 * RATE), format=format))
    rows: list[Any] = [{"audio": reference}, {"audio": reference, "start": 50.0}, {"audio": reference, "end": 3.0}]
    looks = list(looked_at(rows, whole=True, most=4.0))
    assert [(round(one.seconds, 2), one.fault) for one in looks] == [(60, None), (10, None), (3, None)]
    assert sorted(decoded) == [3 * RATE, 4 * RATE, 4 * RATE]
    ((seconds, fault),) = looked_at([{"audio": reference, "end": 90.0}], whole=True, most=4.0)
    assert fault == "a recording in the data itself: has 60.00 s, and the stretch ends at 90 s"
    ((seconds, fault),) = looked_at([{"audio": reference}], whole=False, most=4.0)
    assert (round(seconds, 2), fault) == (60, None)


def test_stretches_that_are_not_there_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encode(TONE))
    path = str(tmp_path / "a.wav")
    rows = [
        {"audio": path, "start": 1.0, "end": 3.0},
        {"audio": path, "start": 2.5},
        {"audio": path, "start": 1.0, "end": 2.2},
        {"audio": str(tmp_path / "b.wav")},
    ]
    for whole in (False, True):
        faults = [fault for _, fault in looked_at(rows, whole=whole)]
        assert faults == [
            f"{path}: has 2.00 s, and the stretch ends at 3 s",
            f"{path}: has 2.00 s, and the stretch starts at 2.5 s",
            None,
            f"{tmp_path / 'b.wav'}: cannot be read: No such file or directory",
        ]
