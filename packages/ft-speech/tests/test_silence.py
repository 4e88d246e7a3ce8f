from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from ft_speech import read_audio
from ft_speech.silence import CLIPPED, clipped_share, sounding, trim_silence, without_ends

RATE = 16_000
WINDOW = RATE // 100


def spoken(noise_db: float, level: float = 0.5) -> np.ndarray:
    """Three seconds: a tone from the first to the second, and noise so far below its power throughout."""
    noise = np.random.default_rng(0).standard_normal(3 * RATE)
    audio = level / np.sqrt(2) * 10 ** (noise_db / 20) * noise
    audio[RATE : 2 * RATE] += level * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    return audio.astype(np.float32)


@pytest.mark.parametrize("level", [0.9, 0.5, 1e-3])
def test_silence_is_what_lies_below_the_threshold_at_any_level(level: float) -> None:
    # The energy of 160 samples of noise scatters by sqrt(2 / 160), half a dB: ten dB are far enough on either side.
    assert sounding(spoken(-50, level), RATE) == (RATE, 2 * RATE)
    assert sounding(spoken(-30, level), RATE) == (0, 3 * RATE)
    assert sounding(spoken(-30, level), RATE, threshold_db=20) == (RATE, 2 * RATE)


def test_trimmed_to_a_margin() -> None:
    audio = spoken(-60)
    for margin in (0.0, 0.05, 0.5):
        kept = round(margin * RATE)
        trimmed = trim_silence(audio, RATE, margin=margin)
        assert np.array_equal(trimmed, audio[RATE - kept : 2 * RATE + kept])
        assert np.shares_memory(trimmed, audio)
    assert np.array_equal(trim_silence(audio, RATE, margin=2), audio)
    assert np.array_equal(trim_silence(trim_silence(audio, RATE), RATE), trim_silence(audio, RATE))


def test_sound_within_a_window_is_kept_whole() -> None:
    audio = np.zeros(RATE)
    audio[1000] = 1e-3  # in the window of 960 to 1120
    assert sounding(audio, RATE) == (960, 1120)
    audio[-1] = 1e-3
    assert sounding(audio[: RATE - 7], RATE) == (960, 1120)
    assert sounding(audio, RATE) == (960, RATE)


@pytest.mark.parametrize("length", [0, 1, WINDOW, WINDOW + 1])
def test_nothing_and_little(length: int) -> None:
    assert len(trim_silence(np.zeros(length), RATE)) == 0
    assert len(trim_silence(np.ones(length), RATE)) == length


def test_the_setting() -> None:
    """The sound's second and twice the margin are left; silence, of which nothing would be, stays."""
    audio = spoken(-60)
    assert len(without_ends(audio, RATE, 40)) == RATE + 2 * round(0.05 * RATE)
    assert without_ends(audio, RATE, None) is audio
    assert len(without_ends(np.zeros(RATE), RATE, 40)) == RATE


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"mono audio, \[samples\], not in \[2, 8\]"):
        trim_silence(np.zeros((2, 8)), RATE)
    for threshold in (0.0, -40.0, float("nan")):
        with pytest.raises(ValueError, match="threshold_db is above 0"):
            trim_silence(np.zeros(8), RATE, threshold_db=threshold)
    for margin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="margin is a number of seconds"):
            trim_silence(np.zeros(8), RATE, margin=margin)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("later", [1.0, 0.25])
def test_clipped_recordings_are_told_from_others(subtype: str, later: float) -> None:
    """Of a sum of harmonics, clipped at half its peak or not, as a file of its own holds it."""
    at = 2 * np.pi * 120 * np.arange(RATE) / RATE
    voice = sum(np.sin(k * at + k * k) / k for k in range(1, 20)) * (1 + np.sin(at / 40))
    voice /= np.abs(voice).max()
    for audio, clipped in ((voice, False), (np.clip(2 * voice, -1, 1), True)):
        file = io.BytesIO()
        soundfile.write(file, later * audio, RATE, format="WAV", subtype=subtype)
        assert (clipped_share(read_audio(file.getvalue())[0]) >= CLIPPED) is clipped


def test_the_share_is_that_of_flat_peaks() -> None:
    audio = np.zeros(100)
    audio[10:13] = 1  # three are no flat peak
    audio[50:56] = -1
    assert clipped_share(audio) == 0.06
    assert clipped_share(np.zeros(100)) == clipped_share(np.full(100, 0.3)) == clipped_share(np.zeros(0)) == 0
