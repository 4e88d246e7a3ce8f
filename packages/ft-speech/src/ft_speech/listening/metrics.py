"""Word and character error rates of what was written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

__all__ = ["UNSPACED", "Normalizer", "normalizer_of", "word_and_character_errors"]

UNSPACED = ("ja", "lo", "my", "th", "yue", "zh")
"""Codes of languages that are written without spaces: each of their characters counts as a word, as in Whisper's paper
(Radford et al. 2022, arXiv:2212.04356, section 4.4)."""

Normalizer = Literal["auto", "english", "basic", "none"]


def word_and_character_errors(
    answers: Sequence[str],
    expected: Sequence[str],
    language: str | Sequence[str | None] | None = None,
    *,
    normalizer: Normalizer = "auto",
    spellings: Mapping[str, str] | None = None,
    also: Callable[[str], str] | None = None,
) -> dict[str, float | None]:
    """``wer`` and ``cer`` over all texts: edits (S + D + I) per word or character expected, the sums over all texts.

    Args:
        answers: what was written down, N texts.
        expected: what should have been, N texts; of one that is empty, all that was written counts as inserted.
        language: the code of the language of all texts, or of each, or None where it is not known.
        normalizer: what makes no difference; see :func:`normalizer_of`.
        spellings: British spellings and the American ones that they are compared as.
        also: applied to both texts after the normaliser.

    Returns:
        The two rates, each None where nothing was expected.

    Raises:
        ValueError: not as many texts expected as there are answers.
    """
    import jiwer

    if len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers, but {len(expected)} expected")
    languages = [language] * len(answers) if language is None or isinstance(language, str) else language
    said: list[str] = []
    wanted: list[str] = []
    for answer, text, code in zip(answers, expected, languages, strict=True):
        plain = normalizer_of(code, normalizer, spellings)
        for made, one in ((said, answer), (wanted, text)):
            made.append(" ".join((also or str)(plain(one)).split()))
    rates: dict[str, float | None] = {}
    for name, count in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
        edits = length = 0
        pairs = [pair for pair in zip(wanted, said, strict=True) if pair[0]]
        if pairs:
            found: Any = count([text for text, _ in pairs], [answer for _, answer in pairs])
            edits = found.substitutions + found.deletions + found.insertions
            length = found.substitutions + found.deletions + found.hits
        more = [answer for text, answer in zip(wanted, said, strict=True) if not text]
        edits += sum(len(answer.split()) if name == "wer" else len(answer) for answer in more)
        rates[name] = edits / length if length else None
    return rates


def normalizer_of(
    language: str | None, kind: Normalizer = "auto", spellings: Mapping[str, str] | None = None
) -> Callable[[str], str]:
    """What brings a text to the form that is compared.

    ``basic`` takes away case, punctuation and what stands in brackets; ``english`` also writes numbers as digits,
    contractions out, and spellings one way (both are Whisper's own, as transformers has them); ``auto`` is ``english``
    for English, ``basic`` for others, with each character a word in those of :data:`UNSPACED`; ``none`` takes away
    nothing but extra white space.
    """
    if kind == "none":
        return str
    if kind == "auto":
        kind = "english" if language == "en" else "basic"
    if kind == "basic":
        return _basic(language in UNSPACED)
    return _english(tuple(sorted((spellings or {}).items())))


@cache
def _basic(split: bool) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    made: Callable[[str], str] = BasicTextNormalizer(split_letters=split)
    return made


@cache
def _english(spellings: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    made: Callable[[str], str] = EnglishTextNormalizer(dict(spellings))
    return made
