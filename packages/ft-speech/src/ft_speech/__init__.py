"""Speech for ft: audio files read and resampled without torchaudio.

>>> from ft_speech import read_audio
>>> samples, sampling_rate = read_audio("speech.mp3")  # doctest: +SKIP

numpy, soundfile and soxr are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_speech.audio import AudioError, read_audio, resample, write_audio

__version__ = "0.1.0"

__all__ = ["AudioError", "__version__", "read_audio", "resample", "write_audio"]


def __getattr__(name: str) -> Any:
    if name in ("AudioError", "read_audio", "resample", "write_audio"):
        from ft_speech import audio

        return getattr(audio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
