"""What ft-speech registers."""

from __future__ import annotations

from ft_core.plugins.specs import ArchitectureSpec, CodecSpec, CommandSpec, ModalitySpec

__all__ = ["CSM", "MEL", "MIMI", "QWEN3_ASR", "SNAC", "SPEAK", "STT", "TRANSCRIBE", "TTS", "WHISPER"]


def _modality(name: str, summary: str, part: str, next: tuple[str, ...]) -> ModalitySpec:
    families, part_settings = "ft_speech.families", f"{name.title()}Settings"
    columns = {"stt": "as_transcription", "tts": "as_speech"}[name]
    return ModalitySpec(
        name=name,
        summary=summary,
        read="ft_speech.audio:read_audio",
        extensions=(".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
        settings=f"ft_speech.{part}.settings:{part_settings}",
        methods=("sft",),
        columns=f"ft_speech.{part}.rows:{columns}",
        rows=f"ft_speech.{part}.rows:normalise",
        load=f"{families}:load_for_training",
        processor=f"{families}:load_processor",
        adapter=f"{families}:adapter_options",
        dataset=f"{families}:dataset",
        collator=f"{families}:collator",
        trainer=f"{families}:trainer",
        evaluate=f"{families}:evaluate",
        fast=f"{families}:fast",
        verify=f"{families}:verify",
        knows=f"{families}:knows_{name}",
        claims=True,
        next=(next,),
    )


STT = _modality(
    "stt", "speech to text: recordings and what is said in them", "listening", ("transcribe", "{run}", "FILES")
)
TTS = _modality(
    "tts", "text to speech: texts and how they are spoken", "speaking",
    ("speak", "TEXT", "--model", "{run}", "--out", "a.wav"),
)  # fmt: skip

TRANSCRIBE = CommandSpec(
    name="transcribe", summary="write down what is said in recordings", module="ft_speech.commands.transcribe"
)
SPEAK = CommandSpec(name="speak", summary="speak a text into a file", module="ft_speech.commands.speak")

SNAC = CodecSpec(
    name="snac", summary="SNAC: codebooks of several rates, as in Orpheus", codec="ft_speech.codecs.snac:Snac"
)
MIMI = CodecSpec(name="mimi", summary="Mimi: 12.5 frames a second, as in CSM", codec="ft_speech.codecs.mimi:Mimi")
MEL = CodecSpec(
    name="mel", summary="codebooks of mel spectra, fitted to recordings in seconds", codec="ft_speech.codecs.mel:Mel"
)

WHISPER = ArchitectureSpec(
    name="whisper", summary="Whisper, its encoder and its decoder", model_types=("whisper",),
    parts=("norms", "linears", "head"),
)  # fmt: skip
QWEN3_ASR = ArchitectureSpec(
    name="qwen3_asr", summary="Qwen 3-ASR: its language side", model_types=("qwen3_asr",),
    describe="ft_speech.qwen_asr.layout:describe",
)  # fmt: skip
CSM = ArchitectureSpec(
    name="csm", summary="CSM: its backbone", model_types=("csm",), describe="ft_speech.csm.layout:describe",
    parts=("norms", "linears", "rotary", "activation"),
)  # fmt: skip
