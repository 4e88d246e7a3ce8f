"""The mel codec, on a made-up voice: harmonics of a gliding pitch through moving formants, with pauses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from ft_speech.codecs import CodecError, load_codec
from ft_speech.codecs.kmeans import kmeans, nearest, residual_codebooks, residual_codes
from ft_speech.codecs.mel import Mel, main
from ft_speech.codecs.spectra import Analysis, band_centres, band_weights, heard
from ft_speech.codecs.vocoder import Vocoder

RATE = 16_000


def voice(seconds: float, seed: int) -> Any:
    random = np.random.default_rng(seed)
    count = int(seconds * RATE)
    knots = np.arange(0, count + RATE, RATE // 5)
    at = np.arange(count)
    pitch = np.interp(at, knots, random.uniform(90, 180, len(knots)))
    formants = [np.interp(at, knots, random.uniform(*range_, len(knots))) for range_ in ((300, 800), (900, 2200))]
    loud = np.interp(at, knots, random.choice([0, 0.05, 0.1], len(knots)))
    phase = np.cumsum(pitch) * 2 * np.pi / RATE
    total = np.zeros(count)
    for k in range(1, 30):
        gain = sum(1 / (1 + ((k * pitch - formant) / 150) ** 2) for formant in formants)
        total += gain * np.cos(k * phase) * (k * pitch < RATE / 2)
    return (loud * total + random.normal(size=count) * 1e-3).astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> Mel:
    return Mel.fit([voice(8, seed) for seed in range(3)], RATE, codebooks=(64, 32), stack=3)


def test_the_bands_are_flat_for_white_noise() -> None:
    analysis = Analysis()
    centres = band_centres(analysis)
    assert np.diff(centres).min() > 99
    assert (np.diff(np.diff(centres)) > -1).all()  # ever wider
    assert np.allclose(band_weights(analysis).sum(axis=1), 1, atol=1e-5)
    noise = np.random.default_rng(0).normal(size=RATE * 4).astype(np.float32) * 0.1
    bands, _, voicing = heard(noise, analysis)
    # A band of 100 Hz has some 400 independent powers in 4 s, exponentially distributed: one sigma is 5 %.
    assert np.allclose(np.exp(bands[5:-5]).mean(axis=0), 0.01, rtol=0.2)
    assert np.isclose(np.exp(bands[5:-5]).mean(), 0.01, rtol=0.04)
    assert (voicing > 0.5).mean() < 0.05


@pytest.mark.parametrize("hertz", [80.0, 123.4, 310.0])
def test_the_pitch_of_a_pulse_train(hertz: float) -> None:
    phase = np.arange(RATE) * 2 * np.pi * hertz / RATE
    tone = sum(np.cos(k * phase) for k in range(1, int(7_900 / hertz))) * 0.01
    _, pitch, voicing = heard(np.asarray(tone, np.float32), Analysis())
    assert np.allclose(pitch[5:-5], hertz, rtol=0.01)
    assert (voicing[5:-5] > 0.9).all()


def test_silence_has_no_voice() -> None:
    bands, pitch, voicing = heard(np.zeros(1600, np.float32), Analysis())
    assert (voicing == 0).all()
    assert np.isfinite(pitch).all()
    assert np.isfinite(bands).all()


def test_what_the_vocoder_speaks_is_heard_again() -> None:
    analysis = Analysis()
    samples = voice(3, 9)
    bands, pitch, voicing = heard(samples, analysis)
    vocoder = Vocoder(analysis)
    again = np.concatenate([vocoder.push(bands, pitch, voicing), vocoder.finish()])
    assert again.shape == samples.shape
    bands_again, pitch_again, voicing_again = heard(again, analysis)
    loud = bands > np.log(1e-4)
    assert np.abs(bands_again - bands)[loud].mean() < 1  # nepers: 4 dB
    both = (voicing > 0.9) & (voicing_again > 0.9)
    assert both.mean() > 0.3
    assert np.median(np.abs(np.log2(pitch_again / pitch))[both]) < 1 / 24  # half a semitone


def test_shapes_layout_and_determinism(codec: Mel) -> None:
    assert codec.layout.sizes == (64, 32)
    assert (codec.sample_rate, codec.frame_samples) == (RATE, 480)
    samples = voice(1, 20)
    codes = codec.encode(samples)
    assert (codes.shape, codes.dtype) == ((34, 2), np.int64)  # 33.3 frames, the last filled up
    assert codes.min() >= 0
    assert (codes < [64, 32]).all()
    decoded = codec.decode(codes)
    assert (decoded.shape, decoded.dtype) == ((34 * 480,), np.float32)
    assert np.array_equal(codec.encode(samples), codes)
    assert np.array_equal(codec.decode(codes), decoded)
    again = Mel.fit([voice(8, seed) for seed in range(3)], RATE, codebooks=(64, 32), stack=3)
    assert all(np.array_equal(a, b) for a, b in zip(codec.books, again.books, strict=True))


def test_nothing_in_nothing_out(codec: Mel) -> None:
    assert codec.encode(np.zeros(0, np.float32)).shape == (0, 2)
    assert codec.decode(np.zeros((0, 2), np.int64)).shape == (0,)


@pytest.mark.parametrize("chunks", [(1,), (4, 1, 0, 7)])
def test_a_stream_is_the_whole(codec: Mel, chunks: tuple[int, ...]) -> None:
    codes = codec.encode(voice(1, 21))
    stream, made, at, turn = codec.stream(), [], 0, 0
    while at < len(codes):
        step = chunks[turn % len(chunks)]
        made.append(stream.push(codes[at : at + step]))
        at, turn = at + step, turn + 1
        assert sum(map(len, made)) >= min(at, len(codes)) * 480 - 240  # a hop and a half late at most
    made.append(stream.finish())
    assert np.array_equal(np.concatenate(made), codec.decode(codes))


def test_the_spectrum_survives(codec: Mel) -> None:
    samples = voice(4, 30)  # not among those it was fitted to
    samples = samples[: len(samples) // 480 * 480]
    before = heard(samples, codec.analysis)[0]
    after = heard(codec.decode(codec.encode(samples)), codec.analysis)[0]
    distance = np.sqrt(((after - before) ** 2).mean())
    shuffled = np.sqrt(((after[np.random.default_rng(0).permutation(len(after))] - before) ** 2).mean())
    assert distance < 0.6 * shuffled  # far nearer than the right sounds at wrong times
    assert distance < 2


def test_more_codes_are_nearer() -> None:
    points = np.random.default_rng(0).normal(size=(2000, 6)).astype(np.float32)
    errors = []
    for sizes in ((8,), (64,), (64, 16)):
        books = residual_codebooks(points, sizes)
        codes = residual_codes(points, books)
        errors.append(((points - sum(book[codes[:, i]] for i, book in enumerate(books))) ** 2).mean())
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_kmeans_ends_where_centres_are_means() -> None:
    points = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    points[:100] = points[0]  # equal ones are likely to be chosen twice, which leaves a centre without points
    centres = kmeans(points, 40, rounds=200)
    assigned = nearest(points, centres)
    assert len(np.unique(assigned)) == 40
    means = np.stack([points[assigned == centre].mean(axis=0) for centre in range(40)])
    assert np.abs(means - centres).max() < 1e-5


def test_saved_and_loaded(codec: Mel, tmp_path: Path) -> None:
    codec.save(tmp_path / "voice")
    again = load_codec("mel", tmp_path / "voice", "cuda:7")  # a codec without networks needs no device
    codes = codec.encode(voice(1, 22))
    assert np.array_equal(again.encode(voice(1, 22)), codes)
    assert np.array_equal(again.decode(codes), codec.decode(codes))
    with pytest.raises(CodecError, match="cannot be written"):
        codec.save(tmp_path / "voice")
    assert [path.name for path in tmp_path.iterdir()] == ["voice"]


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def nan(folder: Path) -> None:
    books = {name: book.copy() for name, book in load_file(folder / "model.safetensors").items()}
    books["codebooks.1"][3, 2] = np.nan
    save_file(books, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: edit(f, codec="snac"), "not of a mel codec"),
        (lambda f: edit(f, hop="160"), "hop is '160'"),
        (lambda f: edit(f, bands=20), r"no codebooks.0 of finite numbers \[codes, 66\]"),
        (lambda f: edit(f, lowest_pitch=500.0), "lowest pitch below the highest"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x10"), "is damaged"),
        (lambda f: save_file({"x": np.ones(2)}, f / "model.safetensors"), "no codebooks.0"),
        (nan, "finite numbers"),
    ],
)
def test_damaged_folders(codec: Mel, tmp_path: Path, damage: object, message: str) -> None:
    folder = tmp_path / "voice"
    codec.save(folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CodecError, match=message) as caught:
        load_codec("mel", folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 32]], "code 32 at place 1 of frame 0: a code there is from 0 to 31"),
        ([[0, 0], [-1, 0]], "code -1 at place 0 of frame 1"),
        ([[0, 0, 0]], r"of shape \[frames, 2\]"),
        ([[0.0, 1.0]], "codes are integers"),
    ],
)
def test_bad_codes(codec: Mel, codes: list[list[float]], message: str) -> None:
    for decode in (codec.decode, codec.stream().push):
        with pytest.raises(ValueError, match=message):
            decode(np.array(codes))


@pytest.mark.parametrize("samples", [np.ones((2, 9), np.float32), np.ones(9, np.int16), np.array([0.0, np.nan])])
def test_bad_samples(codec: Mel, samples: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a codec takes"):
        codec.encode(samples)


def test_too_little_to_fit() -> None:
    with pytest.raises(CodecError, match=r"have 34 frames, and a codebook of 512 codes wants that many \(15 s\)"):
        Mel.fit([voice(1, 0)])
    with pytest.raises(CodecError, match="have 0 frames"):
        Mel.fit([])
    with pytest.raises(ValueError, match="a mel codec has"):
        Mel.fit([voice(1, 0)], codebooks=())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", voice(4, 1), RATE)
    out = str(tmp_path / "codec")
    assert main([str(tmp_path / "a.wav"), "--out", out, "--codebooks", "32", "16"]) == 0
    assert "48 audio tokens, 67 a second, 16000 Hz" in capsys.readouterr().out
    assert load_codec("mel", out).layout.sizes == (32, 16)
    assert main([str(tmp_path / "b.wav"), "--out", str(tmp_path / "more")]) == 2
    assert "b.wav: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
