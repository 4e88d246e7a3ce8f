"""What the mel codec hears in a stretch of audio: its spectral envelope, its pitch, and how voiced it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Analysis", "band_centres", "band_weights", "heard"]

Floats: TypeAlias = npt.NDArray[np.float32]

FLOOR = 1e-7
"""The power of a band, full scale being 1, below which all is silence (-70 dB)."""

_NARROWEST = 100.0  # Hz from a band's centre to the next: closer, they would show the harmonics, not the envelope


@dataclass(frozen=True)
class Analysis:
    """How audio is analysed.

    Attributes:
        sample_rate: in Hz.
        hop: samples from one analysis to the next.
        window: samples that an analysis of the envelope looks at.
        bands: how many bands the envelope has.
        lowest_pitch, highest_pitch: in Hz, of the voices.
        pitch_weight: how much an octave of pitch counts in the choice of a code, for a neper of one band's power.
        voicing_weight: how much it counts that a hop is voiced rather than not.
    """

    sample_rate: int = 16_000
    hop: int = 160
    window: int = 400
    bands: int = 40
    lowest_pitch: float = 60.0
    highest_pitch: float = 400.0
    pitch_weight: float = 12.0
    voicing_weight: float = 6.0

    @property
    def fft(self) -> int:
        """The length of the transforms: twice the window's, so that a filter's ringing has room."""
        return 1 << (2 * self.window - 1).bit_length()


def band_centres(analysis: Analysis) -> npt.NDArray[np.float64]:
    """The centres of the bands in Hz, ``[bands]``: even on the mel scale (O'Shaughnessy 1987), but 100 Hz apart at
    least."""
    top = analysis.sample_rate / 2
    # Even steps on a scale that is linear up to where a step of the mel scale has the least width.
    grid = np.linspace(0, top, 4096)
    density = np.minimum(1 / _NARROWEST, _mel_density(grid) * _scale(analysis, grid))
    place = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    return np.interp((np.arange(analysis.bands) + 0.5) / analysis.bands * place[-1], place, grid)


def _mel_density(frequency: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mel per Hz of 2595 log10(1 + f / 700)."""
    return 2595 / np.log(10) / (700 + frequency)


def _scale(analysis: Analysis, grid: npt.NDArray[np.float64]) -> float:
    """The bands per mel with which all bands, kept at least 100 Hz wide, just reach the top; found by halving."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        bands = np.minimum(1 / _NARROWEST, _mel_density(grid) * middle).mean() * grid[-1]
        low, high = (middle, high) if bands < analysis.bands else (low, middle)
    return low


def band_weights(analysis: Analysis) -> Floats:
    """How much each frequency of a transform counts in each band: triangles, ``[bands, fft // 2 + 1]``, sums 1."""
    frequencies = np.fft.rfftfreq(analysis.fft, 1 / analysis.sample_rate)
    centres = band_centres(analysis)
    edges = np.concatenate([[2 * centres[0] - centres[1]], centres, [2 * centres[-1] - centres[-2]]])
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def heard(samples: Floats, analysis: Analysis) -> tuple[Floats, Floats, Floats]:
    """The envelope, pitch and voicing of every hop.

    Args:
        samples: ``[hops * hop]``; beyond its ends there is silence.

    Returns:
        The natural logarithm of each band's power, white noise of variance v having v in each, ``[hops, bands]``;
        the pitch in Hz, interpolated where nothing is voiced, ``[hops]``; and how voiced it is, 0 to 1, ``[hops]``.
    """
    window: Floats = np.hanning(analysis.window + 2)[1:-1].astype(np.float32)
    frames = _frames(samples, analysis.hop, analysis.window) * window
    power = np.abs(np.fft.rfft(frames, analysis.fft)) ** 2 / (window**2).sum()
    bands = np.log(power.astype(np.float32) @ band_weights(analysis).T + FLOOR)
    pitch, voicing = _pitch(samples, analysis)
    return bands, pitch, voicing


def _frames(samples: Floats, hop: int, length: int) -> Floats:
    """Stretches of audio around the middle of each hop: ``[hops, length]``."""
    before = (length - hop) // 2
    padded = np.pad(samples, (before, length))
    return np.lib.stride_tricks.sliding_window_view(padded, length)[::hop][: len(samples) // hop]


def _pitch(samples: Floats, analysis: Analysis) -> tuple[Floats, Floats]:
    """Pitch and voicing by the autocorrelation of a windowed stretch over that of the window (Boersma 1993)."""
    rate = analysis.sample_rate
    shortest, longest = int(rate / analysis.highest_pitch), int(np.ceil(rate / analysis.lowest_pitch))
    length = 3 * longest
    fft = 1 << (2 * length - 1).bit_length()
    window = np.hanning(length + 2)[1:-1]
    frames = _frames(samples, analysis.hop, length).astype(np.float64)
    frames = (frames - frames.mean(axis=1, keepdims=True)) * window

    def autocorrelation(x: npt.NDArray[np.float64], weights: npt.NDArray[np.float64] | float = 1) -> Any:
        return np.fft.irfft(weights * np.abs(np.fft.rfft(x, fft)) ** 2)[..., : longest + 2]

    # Above 2 kHz a period that is no whole number of samples would be likest to its multiple that is one.
    own = autocorrelation(frames, 1 / (1 + (np.fft.rfftfreq(fft, 1 / rate) / 2_000) ** 8))
    energy = own[:, :1] + 1e-9 * length
    likeness = own / energy / (autocorrelation(window) / (window**2).sum())
    lags = np.arange(shortest, longest + 1)
    # Twice a period is a period as well: of like ones the shortest is meant.
    chosen = shortest + np.argmax(likeness[:, lags] - 0.05 * np.log2(lags / shortest), axis=1)
    rows = np.arange(len(frames))
    left, middle, right = (likeness[rows, chosen + k] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, (left - right) / 2 / np.minimum(bend, -1e-12), 0)
    pitch = rate / (chosen + np.clip(shift, -0.5, 0.5))
    loud = own[:, 0] / (window**2).sum() > 10 * FLOOR
    voicing = np.where(loud, np.clip((middle - 0.4) / 0.4, 0, 1), 0)
    return _steadied(pitch, voicing, analysis)


def _steadied(
    pitch: npt.NDArray[np.float64], voicing: npt.NDArray[np.float64], analysis: Analysis
) -> tuple[Floats, Floats]:
    """Single hops of another pitch or voicing are mistakes: medians of five and three; unvoiced pitch interpolated."""
    voicing = _median(voicing, 3)
    voiced = np.flatnonzero(voicing > 0)
    if not len(voiced):
        return np.full(len(pitch), (analysis.lowest_pitch * analysis.highest_pitch) ** 0.5, np.float32), np.zeros(
            len(pitch), np.float32
        )
    steady = _median(pitch[voiced], 5)
    return np.interp(np.arange(len(pitch)), voiced, steady).astype(np.float32), voicing.astype(np.float32)


def _median(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    padded = np.pad(values, width // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=1))
