"""Stretches of files, and what headers say."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ft_speech import AudioError, read_audio
from ft_speech.audio import audio_info

RATE = 44_100
FORMATS = [("WAV", "PCM_24"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)]


def encode(audio: np.ndarray, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.T, RATE, format=format, subtype=subtype)
    return file.getvalue()


def noise(seconds: float, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (channels, int(seconds * RATE)))


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.1, 0.9), (1.7, None), (2.99, 3.0), (0.0, None)])
def test_a_stretch_is_that_part_of_the_whole(format: str, subtype: str | None, start: float, end: float | None) -> None:
    data = encode(noise(3, channels=2), format, subtype)
    whole = read_audio(data, sampling_rate=None)[0]
    part = read_audio(data, sampling_rate=None, start=start, end=end)[0]
    wanted = whole[round(start * RATE) : None if end is None else round(end * RATE)]
    assert part.shape == wanted.shape
    # libmpg123 goes on from another place in its sums: two roundings of float32 at full scale.
    assert np.abs(part - wanted).max() <= (2 * 2**-24 if format == "MP3" else 0)


def test_the_end_of_an_ogg_file() -> None:
    """Where libvorbisfile may seek another place than it is asked for: none of these may show it."""
    data = encode(noise(30), "OGG", "VORBIS")
    whole = read_audio(data, sampling_rate=None)[0]
    for before in (0.01, 0.05, 0.1, 0.2, 0.3, 1, 5, 23, 24, 29.99):
        part = read_audio(data, sampling_rate=None, start=30 - before)[0]
        assert np.array_equal(part, whole[round((30 - before) * RATE) :])


def test_a_stretch_over_blocks() -> None:
    data = encode(noise(15))
    whole = read_audio(data, sampling_rate=None)[0]
    part = read_audio(data, sampling_rate=None, start=1, end=14)[0]
    assert len(part) > 2 * 2**18  # of more than two blocks
    assert np.array_equal(part, whole[RATE : 14 * RATE])


def test_only_the_stretch_counts_for_its_length() -> None:
    data = encode(noise(3))
    assert len(read_audio(data, start=1, end=2, max_seconds=1)[0]) == 16_000
    with pytest.raises(AudioError, match=r"is longer than 1 s \(max_seconds\)"):
        read_audio(data, start=1, end=2.1, max_seconds=1)


def test_ends_that_are_rounded_and_those_that_are_wrong() -> None:
    data = encode(noise(3))
    assert len(read_audio(data, sampling_rate=None, start=2, end=3.5)[0]) == RATE
    for start, end, said in ((2.0, 3.6, "the stretch ends at 3.6 s"), (3.0, None, "the stretch starts at 3 s")):
        with pytest.raises(AudioError, match=f"has 3.00 s, and {said}"):
            read_audio(data, start=start, end=end)
    for start, end in ((-1.0, None), (2.0, 2.0), (2.0, 1.0), (float("nan"), None)):
        with pytest.raises(ValueError, match="a stretch is from start >= 0 to an end behind it"):
            read_audio(data, start=start, end=end)


def test_the_place_of_a_bad_sample_is_that_in_the_file() -> None:
    audio = noise(2)
    audio[0, RATE + RATE // 2] = np.nan
    data = encode(audio, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"1 samples are NaN or infinite, the first at 1\.500 s"):
        read_audio(data, start=1)
    assert len(read_audio(data, start=0, end=1)[0]) == 16_000


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_what_a_header_says(format: str, subtype: str | None, tmp_path: Path) -> None:
    data = encode(noise(1.5, channels=2), format, subtype)
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        info = audio_info(source)
        assert (info.sampling_rate, info.channels, info.format) == (RATE, 2, format.lower())
        assert info.seconds == 1.5
    path.write_bytes(data[: len(data) // 2])
    read = audio_info if format in ("WAV", "OGG") else read_audio  # flac and mp3 show it when they are decoded
    with pytest.raises(AudioError, match=r"a\.bin: is cut short"):
        read(path)


def test_a_header_of_nothing() -> None:
    with pytest.raises(AudioError, match="holds no samples"):
        audio_info(encode(np.zeros((1, 0))))
    with pytest.raises(AudioError, match="audio of 0 bytes: is empty"):
        audio_info(b"")
