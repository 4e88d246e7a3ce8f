"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib

EXPECTED = {
    "ft_speech": ["AudioError", "__version__", "read_audio", "resample", "write_audio"],
    "ft_speech.audio": [
        "AudioError",
        "AudioInfo",
        "FORMATS",
        "SAMPLING_RATES",
        "SLACK",
        "audio_info",
        "read_audio",
        "resample",
        "write_audio",
    ],
    "ft_speech.containers": ["missing_bytes"],
    "ft_speech.commands.speak": ["add_arguments", "more_help", "run"],
    "ft_speech.orpheus.family": [
        "adapter_options",
        "collator",
        "dataset",
        "evaluate",
        "fast",
        "load_for_training",
        "load_processor",
        "trainer",
    ],
    "ft_speech.orpheus.tokens": [
        "SpeechTokens",
        "document",
        "grow",
        "is_orpheus",
        "prompt_text",
        "speech_tokens",
        "words_of",
    ],
    "ft_speech.speaking.distortion": ["aligned", "mel_cepstra", "mel_cepstral_distortion"],
    "ft_speech.speaking.settings": ["PLACES", "TtsSettings"],
    "ft_speech.speaking.speaker": ["ANY", "SPEAKERS", "Speaker", "open_speaker", "speak"],
    "ft_speech.speaking.spoken": ["Spoken", "measured"],
    "ft_speech.speaking.writing": ["as_sixteen_bits", "sink", "wav_header"],
    "ft_speech.plugin": ["MEL", "MIMI", "QWEN3_ASR", "SNAC", "SPEAK", "STT", "TRANSCRIBE", "TTS"],
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is not None
