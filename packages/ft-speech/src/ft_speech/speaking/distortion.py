"""How far what was spoken is from a recording of the same: mel-cepstral distortion (Kubichek, "Mel-cepstral distance
measure for objective speech quality assessment", 1993)."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["aligned", "mel_cepstra", "mel_cepstral_distortion"]

HOP, WINDOW = 0.010, 0.025
"""Seconds from one spectrum to the next, and that each looks at."""
BANDS = 40
ORDER = 13
"""The coefficients that are compared: 1 to 13, the shape of the envelope and not its pitch; 0 is the loudness."""
TOP = 8_000.0
"""Hz: no band lies above, nor above half of the sampling rate."""
FLOOR = 1e-7
"""The power below which all is silence, full scale being 1."""

Floats: TypeAlias = npt.NDArray[np.float64]


def mel_cepstral_distortion(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating], sample_rate: int) -> float:
    """The distortion of one recording against another, in dB, where both are aligned best.

    Of mel cepstra c and c' of two frames it is ``10 / ln 10 * sqrt(2 * sum((c_d - c'_d)^2))`` over d = 1 to 13; here
    the mean over the frames of the path of :func:`aligned`. Loudness makes no difference.

    Args:
        one, other: mono, ``[samples]``, full scale -1 to 1.
        sample_rate: of both, in Hz.

    Raises:
        ValueError: one of them is empty.
    """
    a, b = mel_cepstra(one, sample_rate)[:, 1:], mel_cepstra(other, sample_rate)[:, 1:]
    if not len(a) or not len(b):
        raise ValueError("there is no distortion of a recording without samples")
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    costs = 10 / np.log(10) * np.sqrt(2 * np.maximum(squares, 0))
    path = aligned(costs)
    return float(costs[path[:, 0], path[:, 1]].mean())


def mel_cepstra(samples: npt.NDArray[np.floating], sample_rate: int, order: int = ORDER) -> Floats:
    """Mel cepstra ``[frames, order + 1]``: the cosine transform of the natural logarithm of the magnitudes of 40 bands,
    such that the logarithm at band b is ``c_0 + 2 * sum(c_d * cos(pi * d * (b + 1/2) / 40))``."""
    samples = np.asarray(samples, dtype=np.float64)
    if not len(samples):
        return np.zeros((0, order + 1))
    hop, length = round(HOP * sample_rate), round(WINDOW * sample_rate)
    padded = np.pad(samples, (length // 2, length))
    stretches = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop][: -(-len(samples) // hop)]
    window = np.hanning(length + 2)[1:-1]
    fft = 1 << (length - 1).bit_length()
    power = np.abs(np.fft.rfft(stretches * window, fft)) ** 2 / (window**2).sum()
    logs = np.log(power @ _bands(sample_rate, fft).T + FLOOR) / 2
    angles = np.pi * np.arange(order + 1)[:, None] * (np.arange(BANDS) + 0.5) / BANDS
    return np.asarray(logs @ np.cos(angles).T / BANDS)


def _bands(sample_rate: int, fft: int) -> Floats:
    """Triangles on the mel scale (O'Shaughnessy 1987), each of sum 1: ``[bands, fft // 2 + 1]``."""
    frequencies = np.fft.rfftfreq(fft, 1 / sample_rate)
    top = 2595 * np.log10(1 + min(TOP, sample_rate / 2) / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    # Bands narrower than the transform's steps would be empty: a triangle is two steps wide at the least.
    half = np.maximum(np.diff(edges), sample_rate / fft)
    rising = (frequencies - edges[1:-1, None]) / half[:-1, None] + 1
    falling = 1 - (frequencies - edges[1:-1, None]) / half[1:, None]
    weights = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def aligned(costs: Floats) -> npt.NDArray[np.int64]:
    """The path of least cost from the first pair to the last, each step one on in one or in both: dynamic time warping
    (Sakoe and Chiba 1978).

    Args:
        costs: of pairs of frames, ``[frames of one, frames of the other]``.

    Returns:
        The pairs, ``[steps, 2]``.
    """
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for diagonal in range(rows + columns - 1):  # all pairs of which no one leads to another
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.minimum(total[i, j], np.minimum(total[i, j + 1], total[i + 1, j]))
        total[i + 1, j + 1] = costs[i, j] + before
    i, j = rows, columns
    path = [(i, j)]
    while (i, j) != (1, 1):
        _, i, j = min((total[i - 1, j - 1], i - 1, j - 1), (total[i - 1, j], i - 1, j), (total[i, j - 1], i, j - 1))
        path.append((i, j))
    return np.array(path[::-1], dtype=np.int64) - 1
