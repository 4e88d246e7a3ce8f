"""What ft-speech registers."""

from __future__ import annotations

from ft_core.plugins.specs import ModalitySpec

__all__ = ["STT", "TTS"]

_AUDIO = (".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
_FAMILY = {
    "load": "ft_speech.families:load_for_training",
    "processor": "ft_speech.families:load_processor",
    "adapter": "ft_speech.families:adapter_options",
    "dataset": "ft_speech.families:dataset",
    "collator": "ft_speech.families:collator",
    "trainer": "ft_speech.families:trainer",
    "evaluate": "ft_speech.families:evaluate",
    "fast": "ft_speech.families:fast",
}

STT = ModalitySpec(
    name="stt",
    summary="speech to text: recordings and what is said in them",
    read="ft_speech.audio:read_audio",
    extensions=_AUDIO,
    settings="ft_speech.listening.settings:SttSettings",
    methods=("sft",),
    columns="ft_speech.listening.rows:as_transcription",
    rows="ft_speech.listening.rows:normalise",
    knows="ft_speech.families:knows_stt",
    claims=True,
    next=(("transcribe", "{run}", "FILES"),),
    **_FAMILY,
)
TTS = ModalitySpec(
    name="tts",
    summary="text to speech: texts and how they are spoken",
    read="ft_speech.audio:read_audio",
    extensions=_AUDIO,
    settings="ft_speech.speaking.settings:TtsSettings",
    methods=("sft",),
    columns="ft_speech.speaking.rows:as_speech",
    rows="ft_speech.speaking.rows:normalise",
    knows="ft_speech.families:knows_tts",
    claims=True,
    next=(("speak", "TEXT", "--model", "{run}", "--out", "a.wav"),),
    **_FAMILY,
)
