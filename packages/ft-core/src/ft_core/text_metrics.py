"""How close texts are to those that were expected: error rates of characters and words, exact match, and ANLS.

For answers of any origin: read from pictures, heard in speech, or written to a question. A question may have several
accepted answers; the one that an answer is closest to counts.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Normalisation", "anls", "character_error_rate", "exact_match", "word_error_rate"]


@dataclass(frozen=True)
class Normalisation:
    """What makes no difference when texts are compared.

    A letter with its accent is one character always, however it is encoded (Unicode's form NFC).

    Attributes:
        ignore_case: whether upper and lower case are the same (Unicode's full case folding).
        whitespace: ``collapse`` takes any run of white space for one space, and none at either end; ``strip`` only
            takes it from the ends; ``keep`` leaves all as it is.
    """

    ignore_case: bool = False
    whitespace: Literal["collapse", "strip", "keep"] = "collapse"

    def __call__(self, text: str) -> str:
        """The text in the form that is compared."""
        text = unicodedata.normalize("NFC", text)
        if self.ignore_case:
            text = unicodedata.normalize("NFC", text.casefold())
        if self.whitespace == "collapse":
            text = " ".join(text.split())
        elif self.whitespace == "strip":
            text = text.strip()
        return text


DEFAULT = Normalisation()
INSENSITIVE = Normalisation(ignore_case=True)


def character_error_rate(
    answers: Sequence[str], accepted: Sequence[Sequence[str]], normalisation: Normalisation = DEFAULT
) -> float | None:
    """Edits of characters per character expected, over all answers: ``sum(S + D + I) / sum(N)``.

    The edits (substitutions, deletions and insertions, each one) are the fewest that make an answer of the expected
    text. The sums go over all answers, so that long texts weigh more, as is usual. Above 1 where answers are longer
    than what was expected.

    Args:
        answers: what was said, N texts.
        accepted: what may be said instead, N lists of one text or more.
        normalisation: what makes no difference.

    Returns:
        The rate; None where no character was expected.

    Raises:
        ValueError: not as many lists as answers, or an empty list.
        ImportError: rapidfuzz is not installed.
    """
    return _error_rate(answers, accepted, normalisation, str)


def word_error_rate(
    answers: Sequence[str], accepted: Sequence[Sequence[str]], normalisation: Normalisation = DEFAULT
) -> float | None:
    """As :func:`character_error_rate`, of words: what white space divides. Punctuation belongs to its word.

    Languages that are written without spaces have no words in this sense.
    """
    return _error_rate(answers, accepted, normalisation, str.split)


def _error_rate(
    answers: Sequence[str],
    accepted: Sequence[Sequence[str]],
    normalisation: Normalisation,
    units: Callable[[str], Sequence[Hashable]],
) -> float | None:
    levenshtein = _levenshtein()
    edits = expected = 0
    for answer, texts in _pairs(answers, accepted):
        said = units(normalisation(answer))
        found = []
        for text in texts:
            wanted = units(normalisation(text))
            distance = levenshtein.distance(said, wanted)
            rate = distance / len(wanted) if wanted else math.inf if distance else 0.0
            found.append((rate, distance, len(wanted)))
        _, distance, length = min(found)
        edits += distance
        expected += length
    return edits / expected if expected else None


def exact_match(
    answers: Sequence[str], accepted: Sequence[Sequence[str]], normalisation: Normalisation = DEFAULT
) -> list[bool]:
    """For each answer, whether it is one of the accepted; their share is the metric of that name.

    Args: as of :func:`character_error_rate`.

    Raises:
        ValueError: not as many lists as answers, or an empty list.
    """
    return [
        normalisation(answer) in {normalisation(text) for text in texts} for answer, texts in _pairs(answers, accepted)
    ]


def anls(answers: Sequence[str], accepted: Sequence[Sequence[str]], *, threshold: float = 0.5) -> float | None:
    """The average normalized Levenshtein similarity, from 0 to 1.

    An answer's distance ``NL`` from an accepted one is the fewest edits of characters between them over the length of
    the longer; its similarity is ``1 - NL`` where ``NL < threshold``, else 0: what is half wrong is not misread but
    wrong. The most similar accepted answer counts, and the mean over all answers is returned. Upper and lower case are
    always the same, and runs of white space one space.

    Equation 1 of "Scene Text Visual Question Answering" (https://arxiv.org/abs/1905.13648), as "DocVQA: A Dataset for
    VQA on Document Images" (https://arxiv.org/abs/2007.00398) uses it. The program of the DocVQA challenge differs
    where ``NL`` is the threshold itself, which there is still a similarity of a half.

    Args:
        answers: what was said, N texts.
        accepted: what may be said instead, N lists of one text or more.
        threshold: the distance from which on an answer counts for nothing.

    Returns:
        The mean; None where there are no answers.

    Raises:
        ValueError: not as many lists as answers, or an empty list.
        ImportError: rapidfuzz is not installed.
    """
    levenshtein = _levenshtein()
    total, count = 0.0, 0
    for answer, texts in _pairs(answers, accepted):
        said = INSENSITIVE(answer)
        distances = [levenshtein.normalized_distance(said, INSENSITIVE(text)) for text in texts]
        nearest = min(distances)
        total += 1 - nearest if nearest < threshold else 0.0
        count += 1
    return total / count if count else None


def _levenshtein() -> Any:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ImportError("error rates and ANLS need rapidfuzz: pip install 'ft-core[metrics]'") from None
    return Levenshtein


def _pairs(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    if len(answers) != len(accepted):
        raise ValueError(f"{len(answers)} answers, but accepted ones for {len(accepted)}")
    for number, texts in enumerate(accepted):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"accepted[{number}] must be a list of one text or more")
    return list(zip(answers, accepted, strict=True))
