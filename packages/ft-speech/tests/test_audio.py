"""Reading: real files, made by libsndfile or espeak-ng or byte by byte."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ft_core.errors import FtError
from ft_speech import AudioError, read_audio

RATE = 16_000


def encode(audio: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str | None = None) -> bytes:
    """``audio`` is [samples] or [channels, samples]."""
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.T, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def noise(seconds: float = 1.0, rate: int = RATE, channels: int | None = None) -> np.ndarray:
    """Smoothed noise within half of full scale: it correlates with nothing but itself, and survives lossy formats."""
    generator = np.random.default_rng(0)
    shape = (channels or 1, int(seconds * rate))
    rough = generator.normal(size=shape)
    smooth = np.stack([np.convolve(row, np.hanning(16), "same") for row in rough])
    smooth *= 0.5 / np.abs(smooth).max()
    return smooth if channels else smooth[0]


def line_of(source: object, **options: object) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- formats and sources


@pytest.mark.parametrize(
    ("format", "subtype", "step"),
    [
        # The error is at most one step of the integers (libsndfile rounds or cuts off; writing scales by 2**n - 1).
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),  # float32 has 24 bits
        ("WAV", "FLOAT", 2**-25),  # rounding of values below one half
        ("WAV", "DOUBLE", 2**-25),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
    ],
)
def test_lossless_formats(format: str, subtype: str, step: float) -> None:
    given = noise()
    audio, rate = read_audio(encode(given, format=format, subtype=subtype))
    assert (rate, audio.dtype, audio.shape) == (RATE, np.float32, given.shape)
    assert np.abs(audio - given).max() <= 1.01 * step


@pytest.mark.parametrize(("format", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_lossy_formats_keep_length_time_and_shape(format: str, subtype: str | None) -> None:
    given = noise()
    audio, rate = read_audio(encode(given, format=format, subtype=subtype))
    assert (rate, audio.shape) == (RATE, given.shape)
    inner = slice(1000, -1000)
    shifts = {s: np.corrcoef(given[inner], np.roll(audio, s)[inner])[0, 1] for s in range(-20, 21)}
    assert max(shifts, key=shifts.__getitem__) == 0  # no delay
    assert shifts[0] > 0.9


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    data = encode(noise())
    path = tmp_path / "a recording.raw"  # an ending from which soundfile alone would conclude headerless samples
    path.write_bytes(data)
    expected, _ = read_audio(data)
    assert np.array_equal(read_audio(path)[0], expected)
    assert np.array_equal(read_audio(str(path))[0], expected)
    with path.open("rb") as file:
        assert np.array_equal(read_audio(file)[0], expected)
        assert not file.closed


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "lies.mp3"
    path.write_bytes(encode(noise(), format="FLAC"))
    assert read_audio(path)[0].shape == (RATE,)


# -- channels and rates


def test_stereo_is_averaged() -> None:
    given = noise(channels=2)
    audio, _ = read_audio(encode(given, subtype="FLOAT"))
    single = given.astype(np.float32).astype(np.float64)
    assert np.array_equal(audio, single.mean(axis=0).astype(np.float32))


def test_channels_can_be_kept() -> None:
    given = noise(channels=3)
    audio, _ = read_audio(encode(given, subtype="FLOAT"), mono=False)
    assert np.array_equal(audio, given.astype(np.float32))
    audio, _ = read_audio(encode(given[0], subtype="FLOAT"), mono=False)
    assert audio.shape == (1, RATE)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("mono", [True, False])
def test_other_rates_are_resampled(rate: int, mono: bool) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    audio, found = read_audio(encode(np.stack([tone, tone]), rate, subtype="FLOAT"), mono=mono)
    assert found == RATE
    assert audio.shape == ((RATE,) if mono else (2, RATE))
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    inner = slice(2000, -2000)  # the filter's ends
    found_tone = audio if mono else audio[1]
    assert np.abs(found_tone[inner] - expected[inner]).max() < 2**-19  # SoX's 20 bits, see test_resample.py


def test_the_files_own_rate_can_be_kept() -> None:
    given = noise(rate=22_050)
    audio, rate = read_audio(encode(given, 22_050, subtype="FLOAT"), sampling_rate=None)
    assert rate == 22_050
    assert np.array_equal(audio, given.astype(np.float32))


def test_long_files_are_decoded_in_blocks() -> None:
    given = noise(40, rate=8_000)  # 320,000 samples: more than a block
    audio, _ = read_audio(encode(given, 8_000, subtype="FLOAT"), sampling_rate=None)
    assert np.array_equal(audio, given.astype(np.float32))


# -- odd but readable


def test_clipped_audio_is_kept() -> None:
    given = np.clip(4 * noise(), -1, 1)
    audio, _ = read_audio(encode(given))
    clipped = np.abs(given) == 1
    assert clipped.sum() > 100
    assert (np.abs(audio[clipped]) >= 1 - 2**-15).all()


def test_float_samples_beyond_full_scale_are_kept() -> None:
    given = (6 * noise()).astype(np.float32)
    audio, _ = read_audio(encode(given, subtype="FLOAT"))
    assert np.abs(given).max() > 2
    assert np.array_equal(audio, given)


def test_a_wav_streamed_without_its_length_is_read() -> None:
    data = bytearray(encode(noise()))
    assert data[36:40] == b"data"
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert read_audio(bytes(data))[0].shape == (RATE,)


# -- what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(value: float) -> None:
    given = noise(channels=2)
    given[1, 8_000:8_003] = value
    assert "3 samples are NaN or infinite, the first at 0.500 s" in line_of(encode(given, subtype="FLOAT"))


def test_no_samples() -> None:
    assert line_of(encode(np.zeros(0))).endswith("holds no samples")


def test_too_short_to_resample() -> None:
    assert "too short to hold one sample at 16000 Hz" in line_of(encode(np.full(1, 0.1), 44_100))


@pytest.mark.parametrize(("format", "subtype"), [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
def test_too_long(format: str, subtype: str | None) -> None:
    data = encode(noise(2), format=format, subtype=subtype)
    assert line_of(data, max_seconds=1.5).endswith("is longer than 1.5 s (max_seconds)")
    assert len(read_audio(data, max_seconds=2)[0]) == 2 * RATE


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_files_cut_short(format: str, subtype: str | None, kept: float, tmp_path: Path) -> None:
    data = encode(noise(3), format=format, subtype=subtype)
    path = tmp_path / f"cut.{format.lower()}"
    path.write_bytes(data[: int(len(data) * kept)])
    assert f"cut.{format.lower()}: is cut short" in line_of(path)


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
def test_no_damage_gets_out_as_another_error(format: str, subtype: str | None) -> None:
    data = encode(noise(0.5), format=format, subtype=subtype)
    chance = random.Random(0)
    refused = 0
    for length in range(1, 60):
        line_of(data[:length])
    for turn in range(100):
        start = chance.randrange(0, min(len(data) - 8, 300 if turn % 2 else len(data)))
        try:
            audio, _ = read_audio(data[:start] + chance.randbytes(8) + data[start + 8 :], max_seconds=60)
            assert np.isfinite(audio).all()
        except AudioError:
            refused += 1
    assert refused


def test_a_corrupt_flac_is_not_read_in_part() -> None:
    data = bytearray(encode(noise(3), format="FLAC"))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    assert "cut short or damaged" in line_of(bytes(data))


def test_other_formats_and_no_audio(tmp_path: Path) -> None:
    assert "is a AIFF file; read are wav, flac, ogg, mp3: convert it" in line_of(encode(noise(), format="AIFF"))
    (tmp_path / "page.wav").write_text("<html>not found</html>" * 100)
    assert "page.wav: is no readable wav, flac, ogg or mp3 file" in line_of(tmp_path / "page.wav")
    (tmp_path / "page.raw").write_text("<html>not found</html>" * 100)
    assert "page.raw: is no readable wav" in line_of(tmp_path / "page.raw")
    (tmp_path / "empty.wav").touch()
    assert line_of(tmp_path / "empty.wav").endswith("empty.wav: is empty")
    assert "none.wav: cannot be read: No such file or directory" in line_of(tmp_path / "none.wav")
    assert "is not a file" in line_of(tmp_path) or "Is a directory" in line_of(tmp_path)
    assert "open it in binary mode" in line_of(io.StringIO("text"))


@pytest.mark.parametrize("rate", [1, 999, 768_001])
def test_a_rate_that_no_audio_has(rate: int) -> None:
    data = bytearray(encode(noise()))
    struct.pack_into("<I", data, 24, rate)
    assert f"its header says {rate} Hz" in line_of(bytes(data))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert "pipe.wav: is not a file" in line_of(tmp_path / "pipe.wav")


def test_wrong_arguments() -> None:
    assert issubclass(AudioError, FtError)
    with pytest.raises(ValueError, match="sampling_rate is a whole number of Hz from 1000 to 768000, not 0"):
        read_audio(encode(noise()), sampling_rate=0)
    with pytest.raises(TypeError, match="not int"):
        read_audio(3)  # type: ignore[arg-type]


# -- speech


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng: apt-get install espeak-ng")
def test_speech(tmp_path: Path) -> None:
    """Spoken words come back as sound where there is speech: 22.05 kHz in, 16 kHz out, the energy below 8 kHz kept."""
    path = tmp_path / "spoken.wav"
    subprocess.run(["espeak-ng", "-w", str(path), "one two three four five six seven"], check=True, timeout=60)
    original, own_rate = soundfile.read(path)
    audio, rate = read_audio(path)
    assert rate == RATE
    assert own_rate != RATE
    assert abs(len(audio) - len(original) * RATE / own_rate) <= 1
    assert len(audio) > RATE  # seven words take more than a second
    # Parseval: energy per second below 7 kHz, where the resampling filter is flat, must be that of the original.
    energy = [
        np.square(np.abs(np.fft.rfft(x)))[np.fft.rfftfreq(len(x), 1 / r) < 7000].sum() / len(x) / len(x)
        for x, r in ((original, own_rate), (audio, rate))
    ]
    assert energy[1] == pytest.approx(energy[0], rel=1e-3)
