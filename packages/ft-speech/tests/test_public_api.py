"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib

EXPECTED = {
    "ft_speech": ["AudioError", "__version__", "read_audio", "resample", "write_audio"],
    "ft_speech.audio": ["AudioError", "FORMATS", "SAMPLING_RATES", "read_audio", "resample", "write_audio"],
    "ft_speech.containers": ["missing_bytes"],
    "ft_speech.codecs": [
        "Codec",
        "CodecError",
        "Layout",
        "StreamDecoder",
        "codec_class",
        "find_codec",
        "load_codec",
    ],
    "ft_speech.codecs.checking": ["as_codes", "as_samples", "whole_frames"],
    "ft_speech.codecs.errors": ["CodecError"],
    "ft_speech.codecs.kmeans": ["kmeans", "nearest", "residual_codebooks", "residual_codes"],
    "ft_speech.codecs.loading": ["codec_class", "find_codec", "load_codec", "read_config", "read_weights"],
    "ft_speech.codecs.mel": ["Mel", "MelStream"],
    "ft_speech.codecs.mimi": ["Mimi", "MimiStream"],
    "ft_speech.codecs.protocol": ["Codec", "Layout", "StreamDecoder"],
    "ft_speech.codecs.snac": ["Snac", "SnacStream", "frame_order"],
    "ft_speech.codecs.snac_model": ["SnacConfig", "SnacModel", "seeded_noise"],
    "ft_speech.codecs.spectra": ["Analysis", "band_centres", "band_weights", "heard"],
    "ft_speech.codecs.vocoder": ["Vocoder"],
    "ft_speech.plugin": ["MEL", "MIMI", "QWEN3_ASR", "SNAC", "SPEAK", "STT", "TRANSCRIBE", "TTS"],
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is not None
