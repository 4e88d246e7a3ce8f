"""From envelopes, pitches and voicing back to audio: a source of harmonics and noise through a changing filter."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ft_speech.codecs.spectra import Analysis, band_centres

__all__ = ["Vocoder"]

Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]


class Vocoder:
    """Synthesises hop after hop; what it gives does not depend on how the hops are dealt out to :meth:`push`.

    The source is a sum of all harmonics of the pitch and of white noise, as much of each as the voicing says, with a
    flat spectrum of power 1. Stretches of it, two hops long about the middle of a hop, under Hann windows that add up
    to 1, go through the minimum-phase filter of the hop's envelope and are added (source and filter: Fant 1960; minimum
    phase by the real cepstrum: Oppenheim and Schafer 1975). The phase of the harmonics goes on from hop to hop, so
    there is none to be searched for as in the algorithm of Griffin and Lim (1984).

    A sample is settled once the middle of a hop that lies a hop or more after it is known.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._rate, self._hop, self._fft = analysis.sample_rate, analysis.hop, analysis.fft
        self._window = np.hanning(2 * analysis.hop + 1)[:-1]
        frequencies = np.fft.rfftfreq(analysis.fft, 1 / analysis.sample_rate)
        centres = band_centres(analysis)
        # What each band has of each frequency: the two about it share it, beyond the last centres there is but one.
        self._spread = np.stack([np.interp(frequencies, centres, row) for row in np.eye(analysis.bands)])
        self._fold = np.zeros(analysis.fft)  # makes a cepstrum one-sided, which is what minimum phase is
        self._fold[1 : analysis.fft // 2] = 2
        self._fold[[0, analysis.fft // 2]] = 1
        self._phase = 0.0
        self._stretches = 0
        self._source = np.zeros(0)  # from the middle of the hop before to that of the last one
        self._last: tuple[Doubles, float, float] | None = None
        self._open = np.zeros(analysis.fft)  # what stretches have given so far from half a hop before the last one on

    def push(self, bands: Floats, pitch: Floats, voicing: Floats) -> Floats:
        """The samples that are settled by more hops.

        Args:
            bands: natural logarithms of the bands' powers, ``[hops, bands]``.
            pitch: in Hz, ``[hops]``.
            voicing: 0 to 1, ``[hops]``.
        """
        made = [
            self._next(band, float(hertz), float(voiced))
            for band, hertz, voiced in zip(bands.astype(np.float64), pitch, voicing, strict=True)
        ]
        return np.concatenate([np.zeros(0), *made]).astype(np.float32)

    def finish(self) -> Floats:
        """The samples that are left."""
        if self._last is None:
            return np.zeros(0, np.float32)
        _, pitch, voicing = self._last
        settled = self._stretch(pitch, voicing)
        self._last = None
        return np.concatenate([settled, self._open[: self._hop // 2]]).astype(np.float32)

    def _next(self, bands: Doubles, pitch: float, voicing: float) -> Doubles:
        if self._last is None:
            self._source = self._segment(pitch, voicing, pitch, voicing)
            made = np.zeros(0)
        else:
            made = self._stretch(pitch, voicing)
        self._last = bands, pitch, voicing
        return made

    def _stretch(self, pitch: float, voicing: float) -> Doubles:
        """Add the last hop's stretch, now that the source up to the next hop's middle is known; what it settles."""
        assert self._last is not None
        bands, last_pitch, last_voicing = self._last
        source = self._segment(last_pitch, last_voicing, pitch, voicing)
        stretch = np.concatenate([self._source, source]) * self._window
        self._open += np.fft.irfft(np.fft.rfft(stretch, self._fft) * self._filter(bands))
        settled, self._open = self._open[: self._hop], np.pad(self._open[self._hop :], (0, self._hop))
        self._source = source
        self._stretches += 1
        return settled[self._hop // 2 :] if self._stretches == 1 else settled  # it began before the first sample

    def _filter(self, bands: Doubles) -> npt.NDArray[np.complex128]:
        cepstrum = np.fft.irfft(bands @ self._spread / 2)  # half the log power is the log magnitude
        return np.asarray(np.exp(np.fft.rfft(cepstrum * self._fold)))

    def _segment(self, pitch: float, voicing: float, next_pitch: float, next_voicing: float) -> Doubles:
        """The source from the middle of one hop to that of the next."""
        way = (np.arange(self._hop) + 1) / self._hop
        phases = self._phase + np.cumsum(pitch + (next_pitch - pitch) * way) * 2 * np.pi / self._rate
        self._phase = float(phases[-1] % (2 * np.pi))
        harmonics = max(1, int(0.98 * self._rate / 2 / max(pitch, next_pitch)))
        voiced = voicing + (next_voicing - voicing) * way
        noise = np.random.default_rng(self._stretches).standard_normal(self._hop)
        return np.sqrt(voiced) * _harmonics(phases, harmonics) + np.sqrt(1 - voiced) * noise


def _harmonics(phases: Doubles, count: int) -> Doubles:
    """``sqrt(2 / count)`` times the sum of ``cos(k phase)`` for k from 1 to count, by Dirichlet's kernel."""
    half = np.sin(phases / 2)
    small = np.abs(half) < 1e-6
    total = np.sin((count + 0.5) * phases) / (2 * np.where(small, 1, half)) - 0.5
    return np.asarray(np.sqrt(2 / count) * np.where(small, count, total))
