"""What every codec asks of the samples and codes that it is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from ft_speech.codecs.protocol import Codes, Layout, Samples

__all__ = ["as_codes", "as_samples", "whole_frames"]


def as_samples(samples: Any) -> Samples:
    """Mono audio as float32 of shape ``[samples]``.

    Raises:
        ValueError: another shape, no floats, or samples that are NaN or infinite.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"a codec takes mono audio, floats of shape [samples], not {samples.dtype} of shape {list(samples.shape)}"
        )
    if not np.isfinite(samples).all():
        raise ValueError("a codec takes finite samples; some of these are NaN or infinite")
    return samples.astype(np.float32, copy=False)


def as_codes(codes: Any, layout: Layout) -> Codes:
    """Codes as int64 of shape ``[frames, places]``.

    Raises:
        ValueError: another shape, no integers, or a code that is not in its place's codebook.
    """
    codes, places = np.asarray(codes), len(layout.sizes)
    if codes.ndim != 2 or codes.shape[1] != places or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"codes are integers of shape [frames, {places}], not {codes.dtype} of shape {list(codes.shape)}"
        )
    bad = np.argwhere((codes < 0) | (codes >= np.array(layout.sizes)))
    if len(bad):
        frame, place = (int(n) for n in bad[0])
        raise ValueError(
            f"code {int(codes[frame, place])} at place {place} of frame {frame}: "
            f"a code there is from 0 to {layout.sizes[place] - 1}"
        )
    return codes.astype(np.int64, copy=False)


def whole_frames(samples: Samples, frame_samples: int) -> Samples:
    """Samples with silence added until the last frame is whole."""
    return np.pad(samples, (0, -len(samples) % frame_samples))
