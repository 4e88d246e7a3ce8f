from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ft_speech import AudioError, read_audio, write_audio

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_round_trip(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"tone.{ending}"
    write_audio(path, np.stack([TONE, TONE]), 16_000)
    audio, rate = read_audio(path, mono=False)
    assert (rate, audio.shape) == (16_000, (2, 16_000))
    assert np.corrcoef(audio[1], TONE)[0, 1] > 0.99
    if ending in ("wav", "flac"):
        assert np.abs(audio - TONE).max() <= 1.01 * 2**-15
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_float_is_bit_exact_and_may_exceed_full_scale(tmp_path: Path) -> None:
    loud = (3 * TONE).astype(np.float32)
    write_audio(tmp_path / "loud.wav", loud, 16_000, subtype="FLOAT")
    assert np.array_equal(read_audio(tmp_path / "loud.wav")[0], loud)


def test_beyond_full_scale_is_refused_unless_clipped(tmp_path: Path) -> None:
    path = tmp_path / "loud.wav"
    with pytest.raises(AudioError, match=r"loud.wav: the peak is 1.500, beyond full scale: scale the audio down"):
        write_audio(path, 3 * TONE, 16_000)
    assert not path.exists()
    write_audio(path, 3 * TONE, 16_000, clip=True)
    assert np.abs(read_audio(path)[0] - np.clip(3 * TONE, -1, 1)).max() <= 2.02 * 2**-15


def test_what_is_refused_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    write_audio(path, TONE, 16_000)
    before = path.read_bytes()
    nan = TONE.copy()
    nan[5] = np.nan
    for audio, options, words in (
        (nan, {}, "NaN or infinite"),
        (np.zeros(0), {}, "at least one"),
        (np.zeros(8, np.int16), {}, "not int16"),
        (TONE, {"subtype": "VORBIS"}, "wav with VORBIS"),
    ):
        with pytest.raises(AudioError, match=words):
            write_audio(path, audio, 16_000, **options)  # type: ignore[arg-type]
    with pytest.raises(AudioError, match=r"the ending says the format, one of \.wav"):
        write_audio(tmp_path / "tone.aac", TONE, 16_000)
    with pytest.raises(AudioError, match=r"no folder/tone.wav: cannot be written: No such file or directory"):
        write_audio(tmp_path / "no folder" / "tone.wav", TONE, 16_000)
    with pytest.raises(AudioError, match="mp3 with its default at 1234 Hz"):
        write_audio(tmp_path / "tone.mp3", TONE, 1234)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tone.wav"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit of the system")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """The system itself refuses to write on: a limit on the size of files, in a process of its own."""
    path = tmp_path / "tone.wav"
    write_audio(path, TONE, 16_000)
    before = path.read_bytes()
    code = (
        "import resource, sys, numpy as np\n"
        "from ft_speech import AudioError, write_audio\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_audio(sys.argv[1], np.zeros(100_000), 16_000)\n"
        "except AudioError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{path}: cannot be written: File too large"
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tone.wav"]
