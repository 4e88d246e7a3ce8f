"""What the model's recordings become: how many tokens, where the encoder lies, and what an answer looks like."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

__all__ = [
    "CHUNK_TOKENS", "ENCODER", "SAMPLING_RATE", "TAG", "Answer", "audio_tokens", "frames_of", "parsed", "written",
]  # fmt: skip

ENCODER = ("audio_tower", "multi_modal_projector")
"""The modules, below ``model``, of the audio encoder and of what leads from it to the language model."""
SAMPLING_RATE = 16_000
"""Samples per second, in Hz, of what the model hears."""
TAG = "<asr_text>"
"""Stands between the language's name and what is said."""
HOP, SHORTEST = 160, 8_000
"""Samples of one frame of the spectrum, and the fewest that a recording is filled up to with silence."""
CHUNK, CHUNK_TOKENS = 100, 13
"""Frames that the encoder's convolutions see at once, and the tokens that they make of them."""


def frames_of(samples: int) -> int:
    """How many frames of 10 ms a recording of so many samples at 16 kHz has, heard alone."""
    return max(samples, SHORTEST) // HOP


def audio_tokens(samples: int) -> int:
    """How many tokens stand for a recording of so many samples at 16 kHz: 13 for each second.

    Three convolutions of stride 2 halve a chunk's frames, rounding up; chunks are of a second (the ``qwen3_asr`` model
    of transformers; :func:`ft_speech.qwen_asr.loading.load_processor` holds the processor at hand to it).
    """
    whole, rest = divmod(frames_of(samples), CHUNK)
    for _ in range(3):
        rest = (rest + 1) // 2
    return whole * CHUNK_TOKENS + rest


class Answer(NamedTuple):
    """What the model has written: the language by its English name, None where it named none; and what is said."""

    language: str | None
    text: str


def written(text: str, language: str | None) -> str:
    """An answer as the model writes it.

    Args:
        language: its English name; None: it is not known, which is learnt as that.
    """
    return f"language {language}{TAG}{text.strip()}"


def parsed(answer: str) -> Answer:
    """What an answer of the model's says. Without the tag all of it is taken for what is said, as after a prompt that
    ends with the tag."""
    before, tag, after = answer.partition(TAG)
    if not tag:
        return Answer(None, answer.strip())
    found = re.fullmatch(r"\s*language\s+(.+?)\s*", before, re.IGNORECASE | re.DOTALL)
    name: Any = None if found is None else found[1]
    return Answer(None if name is None or name.lower() == "none" else name, after.strip())
