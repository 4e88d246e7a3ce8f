"""The other resampler: torchaudio, where it is installed and fits torch; and what is said where not."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile

from ft_core.errors import FtError
from ft_speech import read_audio, resample
from ft_speech.resampling import MOST, by_torchaudio

needed = pytest.mark.skipif(find_spec("torchaudio") is None, reason="needs torchaudio of torch's build")
PAIRS = [(44_100, 16_000), (8_000, 16_000), (22_050, 24_000), (24_000, 8_000)]


def tone(frequency: float, rate: int, length: int, phase: float = 0.3) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(length) / rate + phase)


LOBES = 10 ** (-140 / 20)
"""Those of a Kaiser window of 14.77, whose main lobe ends at 0.925."""


@needed
@pytest.mark.parametrize(("original", "wanted"), PAIRS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.9])
def test_a_tone_is_the_same_tone(original: int, wanted: int, share: float) -> None:
    """As for soxr: same frequency, phase and amplitude, nothing added."""
    frequency = share * min(original, wanted) / 2
    result = resample(tone(frequency, original, original), original, wanted, backend="torchaudio")
    assert len(result) == wanted
    inner = slice(len(result) // 4, -len(result) // 4)
    exact = np.stack([tone(frequency, wanted, len(result)), tone(frequency, wanted, len(result), 0.3 + np.pi / 2)], 1)
    (in_phase, quadrature), *_ = np.linalg.lstsq(exact[inner], result[inner], rcond=None)
    assert np.abs(result - exact @ (in_phase, quadrature))[inner].max() < LOBES
    assert abs(np.arctan2(quadrature, in_phase)) < LOBES
    assert abs(np.hypot(in_phase, quadrature) - 1) < 2 * LOBES  # the passband's ripple: the lobes of both edges


@needed
@pytest.mark.parametrize(("original", "wanted"), [(44_100, 16_000), (48_000, 16_000), (24_000, 8_000)])
def test_what_lies_above_is_removed_not_folded(original: int, wanted: int) -> None:
    result = resample(tone(0.6 * wanted, original, original), original, wanted, backend="torchaudio")
    assert np.abs(result[len(result) // 4 : -len(result) // 4]).max() < LOBES


@needed
def test_files_channels_and_the_other_resampler() -> None:
    """Both agree on a tone at 0.06 of Nyquist to what soxr adds: 2e-6; and float32 rounds to 6e-8."""
    stereo = np.stack([tone(440, 44_100, 44_100), tone(880, 44_100, 44_100)]).astype(np.float32) / 2
    made = resample(stereo, 44_100, 16_000, backend="torchaudio")
    assert (made.dtype, made.shape, made.flags["C_CONTIGUOUS"]) == (np.float32, (2, 16_000), True)
    inner = slice(4_000, -4_000)
    assert np.abs(made - resample(stereo, 44_100, 16_000))[:, inner].max() < 2.2e-6
    file = io.BytesIO()
    soundfile.write(file, stereo.T, 44_100, format="WAV", subtype="FLOAT")
    read, _ = read_audio(file.getvalue(), mono=False, backend="torchaudio")
    assert np.array_equal(read, made)
    for length in (0, 1, 2, 5):
        assert len(resample(np.zeros(length), 8_000, 16_000, backend="torchaudio")) == 2 * length


@needed
def test_rates_without_a_common_divisor_are_refused() -> None:
    with pytest.raises(
        ValueError, match=rf"from 44101 to 16000 Hz would have .* \(allowed: {MOST}\): .*backend='soxr'"
    ):
        by_torchaudio(np.zeros(8), 44_101, 16_000)


def test_without_torchaudio_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # Python's way to say that there is none
    line = r"needs torchaudio, .*: pip install 'ft-speech\[torchaudio\]', of the build that torch \d.*soxr'$"
    with pytest.raises(FtError, match=line):
        resample(np.zeros(8), 8_000, 16_000, backend="torchaudio")


def test_a_torchaudio_of_another_build_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    (folder := tmp_path / "torchaudio").mkdir()  # type: ignore[operator]
    (folder / "__init__.py").write_text("raise OSError('Could not load this library: _torchaudio.so')")
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FtError, match=r"does not load beside torch \d.*CUDA's does not work with the CPU's"):
        resample(np.zeros(8), 8_000, 16_000, backend="torchaudio")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"backend is soxr or torchaudio, .* not sox with HQ"):
        resample(np.zeros(4), 8_000, 16_000, backend="sox")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no quality but HQ; not torchaudio with VHQ"):
        resample(np.zeros(4), 8_000, 16_000, quality="VHQ", backend="torchaudio")
