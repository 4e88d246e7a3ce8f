"""Speech for ft: audio files read and resampled without torchaudio, and what is said in them written down.

>>> from ft_speech import read_audio
>>> samples, sampling_rate = read_audio("speech.mp3")  # doctest: +SKIP
>>> from ft_speech import transcribe
>>> transcribe("openai/whisper-base", "speech.mp3")[0].text  # doctest: +SKIP

numpy, soundfile, soxr and torch are imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_speech.audio import AudioError, read_audio, resample, write_audio
    from ft_speech.listening.recogniser import transcribe

__version__ = "0.1.0"

__all__ = ["AudioError", "__version__", "read_audio", "resample", "transcribe", "write_audio"]


def __getattr__(name: str) -> Any:
    if name in ("AudioError", "read_audio", "resample", "write_audio"):
        from ft_speech import audio

        return getattr(audio, name)
    if name == "transcribe":
        from ft_speech.listening.recogniser import transcribe

        return transcribe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
