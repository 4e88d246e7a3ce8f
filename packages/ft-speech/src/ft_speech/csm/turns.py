"""Turns of a conversation as a CSM reads them: who speaks, what is said, and the frames of how it sounds.

A turn is ``<|begin_of_text|>[SPEAKER]text<|end_of_text|>``, then a token for each frame, and one that ends them, which
is read as a frame of codes too. transformers' ``CsmProcessor`` and chat template write the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError
from ft_speech.csm.settings import MOST_SPEAKERS, CsmSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPEAKERS", "number_speakers", "read_speakers", "speaker_of", "text_ids", "voices_of", "write_speakers"]

SPEAKERS = "speakers"
"""The key of ``tokenizer_config.json`` that holds the number of each voice's speaker."""


def voices_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The voices of rows in normal form, and of the turns before them, one for each turn that has one."""
    return [each["voice"] for row in rows for each in (row, *(row.get("context") or ())) if each.get("voice")]


def number_speakers(voices: Iterable[str], settings: CsmSettings, known: Mapping[str, int]) -> dict[str, int]:
    """The number of each named voice's speaker.

    Args:
        voices: of the rows to be trained on; those that are numbers are their own.
        known: those of the model that is trained on.

    Raises:
        DataError: a voice is in none of ``tts.csm.speakers``, where they are given.
    """
    named = sorted({voice for voice in voices if not _is_number(voice)})
    if settings.speakers is not None:
        for voice in named:
            if voice not in settings.speakers:
                raise DataError(
                    f"the voice {voice!r} is none of tts.csm.speakers ({', '.join(settings.speakers)}): add it there"
                )
        return {**known, **settings.speakers}
    numbers = dict(known)
    taken = {*numbers.values(), *(int(voice) for voice in voices if _is_number(voice))}
    free = (number for number in range(MOST_SPEAKERS) if number not in taken)
    for voice in named:
        if voice not in numbers:
            number = next(free, None)
            if number is None:
                raise DataError(f"there are more than {MOST_SPEAKERS} voices: give some of them one number")
            numbers[voice] = number
    return numbers


def speaker_of(voice: str | None, speakers: Mapping[str, int]) -> int:
    """The number of a voice's speaker; 0 for none, a number for itself.

    Raises:
        DataError: the name is not known.
    """
    if voice is None or not voice.strip():
        return 0
    if voice in speakers:
        return speakers[voice]
    if _is_number(voice):
        return int(voice)
    names = f"the names {', '.join(speakers)}, or " if speakers else ""
    raise DataError(f"the voice {voice!r} is not known (allowed: {names}a speaker's number below {MOST_SPEAKERS})")


def text_ids(text: str, speaker: int, tokenizer: PreTrainedTokenizerBase, audio: Iterable[int]) -> list[int]:
    """The tokens of a turn's text.

    Args:
        audio: the tokens that stand for audio.

    Raises:
        DataError: the text holds one of those, or a token that ends or begins a turn.
    """
    ids: list[int] = tokenizer(f"[{speaker}]{text}", add_special_tokens=False)["input_ids"]
    for token in audio:
        if token in ids:
            raise DataError(f"text holds {tokenizer.convert_ids_to_tokens(token)!r}, which stands for audio")
    for token in tokenizer.all_special_ids:
        if token in ids:
            raise DataError(f"text holds {tokenizer.convert_ids_to_tokens(token)!r}, which ends or begins a turn")
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


def read_speakers(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The numbers that were saved with a tokenizer; none for a model whose voices have no names."""
    found: Any = tokenizer.init_kwargs.get(SPEAKERS)
    if not isinstance(found, Mapping):
        return {}
    return {str(name): number for name, number in found.items() if isinstance(number, int)}


def write_speakers(tokenizer: PreTrainedTokenizerBase, speakers: Mapping[str, int]) -> None:
    """Let a tokenizer be saved with them, in a key of its ``tokenizer_config.json`` that transformers leaves alone."""
    if speakers:
        tokenizer.init_kwargs[SPEAKERS] = dict(speakers)


def _is_number(voice: str) -> bool:
    return voice.isascii() and voice.isdigit() and int(voice) < MOST_SPEAKERS
