"""Resampling by torchaudio, which the extra ``torchaudio`` brings: nothing else here needs it, and it is imported when
it is called."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ft_core.errors import FtError

__all__ = ["by_torchaudio"]

# A window of 2 x 128 zero crossings under a Kaiser window of 14.77 falls by 140 dB between 0.925 and 0.995 of the lower
# Nyquist frequency: nothing is folded, and up to 0.925 nothing is lost.
WIDTH, ROLLOFF, BETA = 128, 0.96, 14.77
MOST = 1 << 24
"""Coefficients of a filter that are taken: torchaudio holds one set for each phase, all at once."""


def by_torchaudio(audio: npt.NDArray[np.floating], original_rate: int, sampling_rate: int) -> npt.NDArray[np.floating]:
    """As :func:`ft_speech.resample`, by ``torchaudio.functional.resample`` in float64, on the CPU.

    Raises:
        FtError: torchaudio is missing, or was made for another torch.
        ValueError: two rates of so small a common divisor that the filter would fill the memory.
    """
    resample = _torchaudio().functional.resample  # before the rates: what is missing is missing for all
    common = math.gcd(original_rate, sampling_rate)
    before, after = original_rate // common, sampling_rate // common
    taps = 2 * math.ceil(WIDTH * before / (min(before, after) * ROLLOFF)) + before
    if after * taps > MOST:
        raise ValueError(
            f"torchaudio's filter from {original_rate} to {sampling_rate} Hz would have {after * taps} coefficients "
            f"(allowed: {MOST}): resample with backend='soxr'"
        )
    if not audio.size:
        return audio.copy()
    import torch

    # Of float32 torchaudio makes the filter in float32 too: 6e-6 to 1e-5 of a tone were off then.
    made = resample(
        torch.from_numpy(np.ascontiguousarray(audio, np.float64)), before, after, lowpass_filter_width=WIDTH,
        rolloff=ROLLOFF, resampling_method="sinc_interp_kaiser", beta=BETA,
    )  # fmt: skip
    return np.ascontiguousarray(made.numpy(), dtype=audio.dtype)


def _torchaudio() -> Any:
    import torch

    try:
        return importlib.import_module("torchaudio")
    except ModuleNotFoundError as error:
        if error.name != "torchaudio":
            raise
        raise FtError(
            "backend='torchaudio' needs torchaudio, which is not installed: pip install 'ft-speech[torchaudio]', of "
            f"the build that torch {torch.__version__} is of, or resample with backend='soxr'"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:  # its own libraries look for those of another torch
        raise FtError(
            f"torchaudio does not load beside torch {torch.__version__}: its wheel must be of the same build (CUDA's "
            "does not work with the CPU's): install that or pip uninstall torchaudio, and resample with backend='soxr'"
        ) from error
