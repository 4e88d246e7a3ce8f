"""What a recogniser hears in a recording: text, its language, and where in time it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ft_speech.listening.metrics import UNSPACED

__all__ = ["Segment", "Transcript", "Word", "joined", "ordered", "together"]


@dataclass(frozen=True)
class Word:
    """A word and where it is spoken, in seconds from the recording's beginning."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Segment:
    """A stretch of speech, a sentence or a part of one.

    Attributes:
        start, end: in seconds from the recording's beginning.
        text: what is said in it, without space at the ends.
        words: its words in order, where they were asked for.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording.

    Attributes:
        text: all of it.
        language: a code such as ``en``, told to the recogniser or found by it; None where it knows of none.
        segments: in order, none beginning before its predecessor's end; empty where no timestamps were asked for.
        cut: how many stretches have text that was cut off at ``max_new_tokens``, or at the model's last position.
    """

    text: str
    language: str | None = None
    segments: tuple[Segment, ...] = ()
    cut: int = 0


def joined(
    parts: Sequence[tuple[float, Transcript]], language: str | None = None, *, translated: bool = False
) -> Transcript:
    """One transcript of the windows of a recording.

    Args:
        parts: by window, in order, where it begins in seconds, and its transcript with times of its own.
        language: the recording's; None: the first that a window names.
        translated: whether the texts are English, whatever is spoken.
    """
    segments = [_moved(segment, start) for start, part in parts for segment in part.segments]
    return Transcript(
        text=together([(part.text, "en" if translated else part.language or language) for _, part in parts]),
        language=language or next((part.language for _, part in parts if part.language), None),
        segments=tuple(segments),
        cut=sum(part.cut for _, part in parts),
    )


def together(texts: Sequence[tuple[str, str | None]]) -> str:
    """Texts, each with the code of its language, as one: with a space between two, unless both are of languages that
    are written without (:data:`ft_speech.listening.metrics.UNSPACED`)."""
    found = [(text, language in UNSPACED) for text, language in texts if text]
    before = [True, *(unspaced for _, unspaced in found)]
    return "".join(
        text if number == 0 or (unspaced and before[number]) else f" {text}"
        for number, (text, unspaced) in enumerate(found)
    )


def ordered(segments: Sequence[Segment], longest: float) -> tuple[Segment, ...]:
    """Segments with times that go forward, within a recording that is ``longest`` seconds long.

    A recogniser writes times as it writes words, and may err: what begins before its predecessor's end begins there,
    what ends before it begins is a point, and what would begin after the recording's end is no part of it.
    """
    found: list[Segment] = []
    now = 0.0
    for segment in segments:
        if not segment.text or segment.start >= longest:
            continue
        start = min(max(segment.start, now), longest)
        now = min(max(segment.end, start), longest)
        found.append(replace(segment, start=start, end=now, words=_within(segment.words, start, now)))
    return tuple(found)


def _within(words: Sequence[Word], start: float, end: float) -> tuple[Word, ...]:
    """Words that lie in a segment, each beginning where the one before it ends, or later."""
    edges = [start, *(min(max(edge, start), end) for word in words for edge in (word.start, word.end))]
    for number, (before, after) in enumerate(pairwise(edges), 1):
        edges[number] = max(edges[number - 1], before, after)
    return tuple(
        replace(word, start=edges[2 * number + 1], end=edges[2 * number + 2]) for number, word in enumerate(words)
    )


def _moved(segment: Segment, by: float) -> Segment:
    words = tuple(replace(word, start=word.start + by, end=word.end + by) for word in segment.words)
    return replace(segment, start=segment.start + by, end=segment.end + by, words=words)
