"""The tokens by which Whisper is told what to do, and what a model says of itself beside its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ft_core.errors import DataError, ModelError

__all__ = ["ENGLISH_ONLY", "Vocabulary", "language_code", "vocabulary_of"]

ENGLISH_ONLY = 51_864
"""The vocabulary of OpenAI's models that know English alone; the others have one token more, or two."""


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of tokens.

    Attributes:
        start, end: of a transcript. previous: begins what was said before, or a prompt.
        no_timestamps: the token before the timestamps', of which there is one for each 0.02 s.
        languages: by code, such as ``en``; empty where the model knows English alone.
        tasks: ``transcribe`` and ``translate``; empty as languages are.
        heads: layer and head of the cross-attention that follows the words' times; empty where none are named.
    """

    start: int
    end: int
    previous: int
    no_timestamps: int
    languages: dict[str, int]
    tasks: dict[str, int]
    heads: tuple[tuple[int, int], ...]

    @property
    def first_time(self) -> int:
        """The token of 0.00 s."""
        return self.no_timestamps + 1

    def prefix(self, language: str | None, task: str) -> list[int]:
        """What a transcript without timestamps begins with."""
        told = [self.languages[language], self.tasks[task]] if language is not None and self.languages else []
        return [self.start, *told, self.no_timestamps]


def vocabulary_of(model: Any, tokenizer: Any, name: str) -> Vocabulary:
    """The tokens of a Whisper model, from its generation configuration and, where that is silent, its tokenizer.

    Args:
        name: what to call the model.

    Raises:
        ModelError: the tokenizer is not Whisper's.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    said, known = model.generation_config, tokenizer.get_vocab()

    def token(word: str) -> int:
        if word not in known:
            raise ModelError(f"the tokenizer of {name} has no {word}: it is not that of a Whisper model")
        return int(known[word])

    is_multilingual = getattr(said, "is_multilingual", None)
    if is_multilingual is None:
        is_multilingual = model.config.vocab_size != ENGLISH_ONLY and "<|en|>" in known
    languages = {code: int(known[f"<|{code}|>"]) for code in LANGUAGES if f"<|{code}|>" in known}
    rows = model.get_input_embeddings().weight.shape[0]
    return Vocabulary(
        start=token("<|startoftranscript|>"),
        end=token("<|endoftext|>"),
        previous=token("<|startofprev|>"),
        no_timestamps=token("<|notimestamps|>"),
        languages={code: number for code, number in languages.items() if number < rows} if is_multilingual else {},
        tasks={task: token(f"<|{task}|>") for task in ("transcribe", "translate")} if is_multilingual else {},
        heads=tuple((int(layer), int(head)) for layer, head in getattr(said, "alignment_heads", None) or ()),
    )


def language_code(language: str, known: dict[str, int], name: str) -> str:
    """The code of a language that is given as a code or by its English name.

    Args:
        known: the codes that the model knows.

    Raises:
        DataError: it knows no such language.
    """
    import difflib

    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    asked = language.strip().lower()
    code = asked if asked in known else TO_LANGUAGE_CODE.get(asked, asked.partition("-")[0].partition("_")[0])
    if code in known:
        return code
    if not known:
        if code in ("en", "english"):
            return "en"
        raise DataError(f"language: {language!r}: {name} knows English alone")
    names = {LANGUAGES[code]: code for code in known if code in LANGUAGES}
    close = difflib.get_close_matches(asked, names, 1)
    hint = f"; did you mean {names[close[0]]} ({close[0]})?" if close else ""
    raise DataError(f"language: {language!r} is none of the {len(known)} that {name} knows, such as en, de, fr{hint}")
