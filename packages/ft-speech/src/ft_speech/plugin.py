"""What ft-speech registers."""

from __future__ import annotations

from ft_core.plugins.specs import ModalitySpec

__all__ = ["STT"]

STT = ModalitySpec(
    name="stt",
    summary="speech to text: audio, read and resampled; training on it is not there yet",
    read="ft_speech.audio:read_audio",
    extensions=(".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
)
