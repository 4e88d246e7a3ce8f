"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib

EXPECTED = {
    "ft_speech": ["AudioError", "__version__", "read_audio", "resample", "transcribe", "write_audio"],
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
    "ft_speech.commands.speak": ["add_arguments", "more_help", "run"],
    "ft_speech.commands.transcribe": ["add_arguments", "more_help", "run"],
    "ft_speech.containers": ["missing_bytes"],
    "ft_speech.listening.augment": ["mask_features", "vary_samples"],
    "ft_speech.listening.formats": ["FORMATS", "as_row", "clock", "cues", "document", "srt", "text", "vtt"],
    "ft_speech.listening.metrics": ["Normalizer", "UNSPACED", "normalizer_of", "word_and_character_errors"],
    "ft_speech.listening.progress": ["Shown", "seconds_of"],
    "ft_speech.listening.recogniser": [
        "LONG_FORMS",
        "LongForm",
        "RECOGNISERS",
        "Recogniser",
        "TASKS",
        "TIMESTAMPS",
        "Timestamps",
        "check_task",
        "open_recogniser",
        "recognise",
        "transcribe",
    ],
    "ft_speech.listening.recordings": ["Look", "UnusableAudio", "looked_at"],
    "ft_speech.listening.settings": ["AugmentSettings", "SttSettings"],
    "ft_speech.resampling": ["by_torchaudio"],
    "ft_speech.silence": ["CLIPPED", "clipped_share", "sounding", "trim_silence", "without_ends"],
    "ft_speech.speaking.recordings": ["Recording", "clipped_line", "read_recording"],
    "ft_speech.listening.transcripts": ["Segment", "Transcript", "Word", "joined", "ordered"],
    "ft_speech.listening.windows": ["FRAME", "PAUSE", "SPREAD", "at_pauses", "is_silent"],
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
    "ft_speech.plugin": ["CSM", "MEL", "MIMI", "QWEN3_ASR", "SNAC", "SPEAK", "STT", "TRANSCRIBE", "TTS", "WHISPER"],
    "ft_speech.speaking.distortion": ["aligned", "mel_cepstra", "mel_cepstral_distortion"],
    "ft_speech.speaking.settings": ["PLACES", "TtsSettings"],
    "ft_speech.speaking.speaker": ["ANY", "SPEAKERS", "Speaker", "open_speaker", "speak"],
    "ft_speech.speaking.spoken": ["Spoken", "measured"],
    "ft_speech.speaking.writing": ["as_sixteen_bits", "sink", "wav_header"],
    "ft_speech.whisper.aligning": ["in_words", "path", "token_times", "without_pauses", "words_of"],
    "ft_speech.whisper.asking": ["FALLBACK", "Frames", "chances_kept", "generation_of", "processor_of"],
    "ft_speech.whisper.collating": ["WhisperCollator", "collator", "workers_of"],
    "ft_speech.whisper.ctranslate2_file": ["CTranslate2File", "read_file"],
    "ft_speech.whisper.documents": ["Examples", "SAID", "dataset", "examples"],
    "ft_speech.whisper.evaluating": ["evaluate"],
    "ft_speech.whisper.from_ctranslate2": ["convert", "main", "weights"],
    "ft_speech.whisper.labels": ["Labels", "TICK", "labels_of"],
    "ft_speech.whisper.loading": [
        "adapter_options",
        "encoder_of",
        "load_for_training",
        "load_processor",
        "settings_of",
    ],
    "ft_speech.whisper.training": ["trainer"],
    "ft_speech.whisper.transcribing": ["WhisperRecogniser"],
    "ft_speech.whisper.vocabulary": ["ENGLISH_ONLY", "Vocabulary", "language_code", "vocabulary_of"],
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
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is not None
