"""The tokens by which a language model is told to speak, and those that the sound is made of.

A model of Orpheus' has them: ``<custom_token_N>``, of which the first ten frame what is said, and the code ``c`` at
place ``p`` of a frame is ``N = 10 + 4096 p + c`` (canopylabs/orpheus-tts: the published training script and decoder).
Any other model is given tokens of these names:

    <|speech_start|>  <|speech_end|>  <|audio_0|>  <|audio_1|>  …
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ft_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from ft_speech.codecs.protocol import Codes, Layout

__all__ = ["SpeechTokens", "document", "grow", "is_orpheus", "prompt_text", "speech_tokens", "words_of"]

FIRST = 10
"""The number of Orpheus' first token of sound."""
START, END, AUDIO = "<|speech_start|>", "<|speech_end|>", "<|audio_{}|>"


@dataclass(frozen=True)
class SpeechTokens:
    """Token ids.

    Attributes:
        before: what stands before a text. after: what stands between it and the sound.
        first: the first token of the sound; the others follow it, in the order of ``layout``.
        end: ends the sound. closing: what follows the end.
        layout: of the codec's frames.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    first: int
    end: int
    closing: tuple[int, ...]
    layout: Layout

    def ids(self, codes: Codes) -> list[int]:
        """The tokens of codes ``[frames, places]``, frame after frame."""
        offsets = np.array([self.layout.offset(place) for place in range(len(self.layout.sizes))])
        ids: list[int] = (np.asarray(codes, dtype=np.int64) + offsets + self.first).reshape(-1).tolist()
        return ids

    def place(self, place: int) -> range:
        """The tokens that may stand at a place of a frame."""
        start = self.first + self.layout.offset(place)
        return range(start, start + self.layout.sizes[place])


def is_orpheus(tokenizer: Any) -> bool:
    """Whether the tokens of sound are Orpheus'."""
    return f"<custom_token_{FIRST}>" in tokenizer.get_vocab()


def grow(tokenizer: Any, layout: Layout) -> int:
    """Give a tokenizer the tokens that it lacks; returns how many these were.

    Raises:
        ModelError: it has those of a codec with other codes.
    """
    known = tokenizer.get_vocab()
    if is_orpheus(tokenizer):
        return 0
    wanted = [START, END, *(AUDIO.format(number) for number in range(layout.tokens))]
    new = [name for name in wanted if name not in known]
    if new and len(new) != len(wanted):
        have = sum(1 for name in known if name.startswith(AUDIO.partition("{")[0]))
        raise ModelError(
            f"the tokenizer has {have} tokens of sound already, the codec has {layout.tokens}: the model was trained "
            "with another codec (tts.codec, tts.codec_model)"
        )
    if new:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    return len(new)


def speech_tokens(tokenizer: Any, layout: Layout) -> SpeechTokens:
    """The tokens of a tokenizer that has them (see :func:`grow`).

    Raises:
        ModelError: it lacks some, or they do not follow each other.
    """
    known: Mapping[str, int] = tokenizer.get_vocab()
    orpheus = is_orpheus(tokenizer)
    audio = "<custom_token_{}>" if orpheus else AUDIO
    shift = FIRST if orpheus else 0
    first, last = known.get(audio.format(shift)), known.get(audio.format(shift + layout.tokens - 1))
    if first is None or last is None or last - first != layout.tokens - 1:
        raise ModelError(
            f"the tokenizer has no {layout.tokens} tokens {audio.format(shift)}, {audio.format(shift + 1)} … that "
            "follow each other, as many as the codec has codes: it belongs to another codec (tts.codec)"
        )
    if not orpheus:
        begins = tokenizer("")["input_ids"][:1]
        bos = tokenizer.bos_token_id
        before = (bos,) if bos is not None and begins == [bos] else ()
        return SpeechTokens(before, (known[START],), first, known[END], (tokenizer.eos_token_id,), layout)
    own = [known[f"<custom_token_{number}>"] for number in range(FIRST)]
    speech, ended, human, human_ended, ai, ai_ended = own[1:7]
    text_ended = known.get("<|eot_id|>", tokenizer.eos_token_id)
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return SpeechTokens((human, *bos), (text_ended, human_ended, ai, speech), first, ended, (ai_ended,), layout)


def prompt_text(row: Mapping[str, Any], prompt: str | None) -> str:
    """The text by which a row's sound is asked for; see :attr:`ft_speech.speaking.settings.TtsSettings.prompt`."""
    said = {name: str(row.get(name) or "") for name in ("text", "voice", "style")}
    if prompt is not None:
        return prompt.format(**said)
    voice, style = said["voice"] and f"{said['voice']}: ", said["style"] and f"<{said['style']}> "
    return f"{voice}{style}{said['text']}"


def words_of(tokenizer: Any, text: str, tokens: SpeechTokens) -> list[int]:
    """A text's tokens.

    Raises:
        DataError: it has none, or one of those that frame speech or are it: a text may not hold these by name.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    reserved = {*tokens.before, *tokens.after, tokens.end, *tokens.closing}
    sound = range(tokens.first, tokens.first + tokens.layout.tokens)
    for token in ids:
        if token in reserved or token in sound:
            raise DataError(f"the text holds {tokenizer.convert_ids_to_tokens(token)!r}, which is no word: take it out")
    if not ids:
        raise DataError("the text has no tokens, so there is nothing to be spoken")
    return ids


def document(tokens: SpeechTokens, words: Sequence[int], codes: Codes) -> tuple[list[int], int]:
    """The tokens of a text and its sound, and how many of these come before the sound."""
    asked = [*tokens.before, *words, *tokens.after]
    return [*asked, *tokens.ids(codes), tokens.end, *tokens.closing], len(asked)
