"""The languages' names, as Qwen3-ASR writes them before what is said."""

from __future__ import annotations

from ft_core.errors import DataError

__all__ = ["LANGUAGES", "code_of", "name_of", "told"]

LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "mk": "Macedonian", "ms": "Malay",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "th": "Thai",
    "tr": "Turkish", "vi": "Vietnamese", "yue": "Cantonese", "zh": "Chinese",
}  # fmt: skip
"""The 30 languages of the model's card, by their codes."""


def name_of(code: str) -> str:
    """The English name of a language, by its code: one of :data:`LANGUAGES`, or, for a language that the model is yet
    to learn, one of Whisper's, written as these are.

    Raises:
        DataError: neither has it.
    """
    if code in LANGUAGES:
        return LANGUAGES[code]
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as MORE

    if code not in MORE:
        raise DataError(f"no language has the code {code!r}: known are those of Qwen3-ASR and of Whisper (en, de, …)")
    return " ".join(word.capitalize() for word in MORE[code].split())


def code_of(name: str | None) -> str | None:
    """The code of a language by its English name; None for none, or one that is not known."""
    if name is None:
        return None
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    said = name.strip().lower()
    own = {known.lower(): code for code, known in LANGUAGES.items()}
    found = own.get(said) or TO_LANGUAGE_CODE.get(said)
    return None if found is None else str(found)


def told(language: str) -> str:
    """The code of a language that somebody names, by its code or English name.

    Raises:
        DataError: it is neither.
    """
    code = code_of(language) or language.strip().lower()
    try:
        name_of(code)
    except DataError:
        raise DataError(
            f"language: {language!r} is not known (allowed: {', '.join(sorted(LANGUAGES))}, their English names, and "
            "what a model was taught beside them)"
        ) from None
    return code
