from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ft_core.errors import DataError
from ft_speech import AudioError, write_audio
from ft_speech.references import audio_name, open_reference, open_row, reference_of

RATE = 16_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def encoded(format: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, TONE, RATE, format=format, subtype=subtype)
    return file.getvalue()


# -- what rows give


def test_paths(tmp_path: Path) -> None:
    assert reference_of("a/b.wav", tmp_path) == str(tmp_path / "a" / "b.wav")
    assert reference_of("../b.wav", tmp_path / "data") == str(tmp_path / "b.wav")
    assert reference_of(Path("b.wav"), tmp_path) == str(tmp_path / "b.wav")
    assert reference_of("/x/b.wav", tmp_path) == "/x/b.wav"
    assert reference_of("~/b.wav", tmp_path) == str(Path("~/b.wav").expanduser())
    assert reference_of("file:///x/a%20b.wav", tmp_path) == "/x/a b.wav"
    assert reference_of("FILE://localhost/x/a b.wav", tmp_path) == "/x/a b.wav"
    assert reference_of({"bytes": None, "path": "b.wav"}, tmp_path) == str(tmp_path / "b.wav")


def test_rows_of_the_hub_name_files_of_its_caches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever wrote them chose what is read of this machine."""
    import datasets

    cache, private = tmp_path / "cache", tmp_path / "private.wav"
    (cache / "extracted").mkdir(parents=True)
    private.touch()
    (cache / "link.wav").symlink_to(private)
    linked = tmp_path / "linked"
    linked.symlink_to(cache)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", linked)
    monkeypatch.setenv("HOME", str(tmp_path))
    own = str(cache / "extracted" / "a.wav")
    assert reference_of({"bytes": None, "path": own}) == reference_of(f"file://{own}") == own
    assert reference_of("~/cache/extracted/a.wav") == own
    for given in (
        str(private), f"file://{private}", "~/private.wav", {"path": str(private)}, Path(private),
        f"{cache}/../private.wav", str(cache / "link.wav"),
        f"{cache}-of-another/a.wav", f"file://{cache}/%2e%2e/private.wav",
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"audio is a path of this machine, .*, in a row of the Hub") as error:
            reference_of(given)
        assert "\n" not in str(error.value)
        if isinstance(given, str):
            reference_of(given, tmp_path)  # whoever gives a file of this machine may name others


@pytest.mark.parametrize(
    ("format", "subtype", "kind"),
    [("WAV", None, "wav"), ("FLAC", None, "flac"), ("OGG", "VORBIS", "ogg"), ("MP3", None, "mpeg")],
)
def test_encoded_recordings_are_kept_as_they_are(format: str, subtype: str | None, kind: str) -> None:
    data = encoded(format, subtype)
    reference = reference_of({"bytes": data, "path": "elsewhere.wav"})
    assert reference == reference_of(data) == reference_of(bytearray(data))
    head, _, body = reference.partition(",")
    assert head == f"data:audio/{kind};base64"
    assert base64.b64decode(body) == data
    assert reference_of(reference) == reference
    assert len(open_reference(reference)) == RATE


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (TONE, "wav"),
        (TONE.astype(np.float64), "wav"),
        (TONE.tolist(), "wav"),
        (3 * TONE, "wav"),  # beyond full scale
        (np.arange(-32768, 32768, dtype=np.int16), "flac"),
        (np.arange(-32768, 32768) / 32768, "flac"),
        (np.array([1.0, -1.0]), "wav"),  # 16 bits hold -1, not 1
    ],
)
def test_arrays_are_the_same_samples_again(given: Any, kind: str) -> None:
    reference = reference_of({"array": given, "sampling_rate": 22_050, "path": None})
    assert reference.startswith(f"data:audio/{kind};base64,")
    array = np.asarray(given)
    wanted = array / np.float64(32768) if array.dtype == np.int16 else array
    assert np.array_equal(open_reference(reference, None), wanted.astype(np.float32))


def test_arrays_of_several_channels() -> None:
    both = np.stack([TONE, -TONE])
    assert np.array_equal(open_reference(reference_of({"array": both, "sampling_rate": RATE})), np.zeros(RATE))
    ten = np.zeros((10, 8), np.int16)  # more than flac has
    assert reference_of({"array": ten, "sampling_rate": RATE}).startswith("data:audio/wav")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "audio must be a path, a data: URL, bytes, or an object .*, not null"),
        ("", "audio must be a path, .*, not empty"),
        (3, "audio must be a path, .* not a int"),
        ([1.0, 2.0], "audio must be a path, .* not a list"),
        ({"file": "a.wav", "path": None}, "audio must be .*, not an object with 'file'"),
        ({}, "not an object with nothing"),
        ("https://x.org/a.wav", "audio is a URL, https://x.org/a.wav, which is not fetched: download it"),
        ("s3://x/a.wav", "audio is a URL, s3://x/a.wav"),
        ("file://host/a.wav", "a file of the host host: write file:///folder/a.wav"),
        ("~nobody-of-that-name/a.wav", "of a user whom this machine does not know"),
        ("a.wav", "audio is a relative path, a.wav, in rows that come from no file of this machine"),
        ("/a\0.wav", "no path has a NUL character"),
        ("data:audio/wav,abc", "audio is a data: URL without base64: write data:audio/wav;base64,"),
        ("data:audio/wav;base64,a?b", "audio is no base64: "),
        ("data:audio/wav;base64,é", "audio is no base64: "),
        ({"array": [0.1]}, "audio's sampling_rate must be a whole number of Hz from 1000 to 768000, not None"),
        ({"array": [0.1], "sampling_rate": 3}, "sampling_rate must be .*, not 3"),
        ({"array": [0.1], "sampling_rate": True}, "sampling_rate must be .*, not True"),
        ({"array": [], "sampling_rate": RATE}, r"audio's array must be int16 or floats .*; not float64 of shape \[0\]"),
        ({"array": [[0.1], [0.1, 0.2]], "sampling_rate": RATE}, "audio's array must be .*; not object"),
        ({"array": ["a"], "sampling_rate": RATE}, "audio's array must be int16 or floats"),
        ({"array": [1, 2], "sampling_rate": RATE}, r"array must be int16 or floats .*; not int64 of shape \[2\]"),
        ({"array": [float("nan")], "sampling_rate": RATE}, "audio's array has samples that are NaN or infinite"),
    ],
)
def test_other_things_are_refused(given: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as error:
        reference_of(given)
    assert "\n" not in str(error.value)


# -- opened


def test_a_fault_has_the_references_name(tmp_path: Path) -> None:
    assert audio_name("/x/a.wav") == "/x/a.wav"
    reference = reference_of(b"no audio")
    assert audio_name(reference) == "a recording in the data itself"
    with pytest.raises(
        AudioError, match=r"^a recording in the data itself: is no readable wav, flac, ogg or mp3 file$"
    ):
        open_reference(reference)
    with pytest.raises(AudioError, match=re.escape(f"{tmp_path}/none.wav: cannot be read: No such file")):
        open_reference(str(tmp_path / "none.wav"))
    with pytest.raises(AudioError, match=r"a recording in the data itself: is longer than 0\.5 s"):
        open_reference(reference_of(encoded()), max_seconds=0.5)


def test_a_row_is_its_stretch(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_audio(path, TONE, RATE, subtype="FLOAT")
    assert np.array_equal(open_row({"audio": str(path), "text": ""}), TONE)
    part = open_row({"audio": str(path), "text": "", "start": 0.25, "end": 0.75}, max_seconds=0.5)
    assert np.array_equal(part, TONE[4000:12_000])
    assert np.array_equal(open_row({"audio": str(path), "start": 0.25}), TONE[4000:])
    assert len(open_row({"audio": str(path), "end": 0.75}, 8_000)) == 6_000


def test_a_row_without_its_silence(tmp_path: Path) -> None:
    """A quarter of a second of sound within a second, and of the stretch that is meant."""
    audio = np.zeros(16_000, np.float32)
    audio[4_000:8_000] = 0.5  # whole windows of 160
    soundfile.write(tmp_path / "a.wav", audio, 16_000)
    row = {"audio": str(tmp_path / "a.wav")}
    assert np.array_equal(open_row(row, trim_silence=40), audio[4_000 - 800 : 8_000 + 800])
    assert len(open_row(row)) == 16_000
    # from 6000 on: 2000 samples end within the 13th window
    assert len(open_row({**row, "start": 0.375, "end": 0.9}, trim_silence=40)) == 13 * 160 + 800
