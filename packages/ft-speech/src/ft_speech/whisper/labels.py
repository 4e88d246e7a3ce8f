"""What Whisper is to write of a recording, as tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ft_core.errors import DataError
from ft_speech.listening.metrics import UNSPACED
from ft_speech.listening.settings import SttSettings
from ft_speech.whisper.vocabulary import Vocabulary, language_code, vocabulary_of

__all__ = ["TICK", "Labels", "labels_of"]

TICK = 0.02
"""Seconds between two timestamps."""
MARKED = re.compile(r"<\|[^|<>]*\|>")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Labels:
    """Writes rows as tokens.

    Attributes:
        vocabulary: the model's own tokens.
        tokenizer: its tokenizer.
        settings: the section ``stt``.
        seconds: how long a recording may be.
        name: what to call the model in messages.
    """

    vocabulary: Vocabulary
    tokenizer: Any
    settings: SttSettings
    seconds: float
    name: str

    def __call__(self, row: Row) -> list[int]:
        """The labels of a row: ``<|language|><|task|><|notimestamps|>`` and the text, or the segments each between two
        timestamps; and ``<|endoftext|>``. The model puts ``<|startoftranscript|>`` before them by itself.

        The text begins with a space where its language has them, as what Whisper writes does; a translation is English,
        whatever is spoken.

        Raises:
            DataError: its language is missing or not known, its text holds one of Whisper's own tokens, or its
                segments are not in order.
        """
        known, language = self.vocabulary, self.language(row)
        task = self.task(row)
        ids = known.prefix(language, task)[1:]
        written = "en" if task == "translate" else language
        if self.settings.timestamps and row.get("segments"):
            ids.pop()  # <|notimestamps|>
            for start, end, text in self._segments(row["segments"]):
                ids += [self._time(start), *self._text(text, written), self._time(end)]
        else:
            ids += self._text(row["text"], written)
        return [*ids, known.end]

    def language(self, row: Row) -> str | None:
        """The code of a row's language; None where the model knows English alone.

        Raises:
            DataError: as :meth:`__call__`.
        """
        given = row.get("language") or self.settings.language
        known = self.vocabulary.languages
        if given is None and known:
            raise DataError(
                "has no language, and stt.language is not set: set it, such as stt.language=en, or give the rows a "
                "column language"
            )
        code = None if given is None else language_code(given, known, self.name)
        return code if known else None

    def task(self, row: Row) -> str:
        """What is to be written of a row's recording.

        Raises:
            DataError: it is to be translated by a model that knows English alone.
        """
        task = str(row.get("task") or self.settings.task)
        if task == "translate" and not self.vocabulary.tasks:
            raise DataError(f"is to be translated, which {self.name}, of English alone, does not")
        return task

    def _text(self, text: str, language: str | None) -> list[int]:
        for word in MARKED.findall(text):
            if self.tokenizer.convert_tokens_to_ids(word) in self._own:
                raise DataError(f"text holds {word!r}, which means something else to the model")
        text = text.strip()
        space = " " if text and language not in UNSPACED else ""
        ids: list[int] = self.tokenizer(space + text, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def _own(self) -> range:
        return range(min(self.vocabulary.end, self.vocabulary.start), self.vocabulary.first_time + 1501)

    def _time(self, seconds: float) -> int:
        return self.vocabulary.first_time + round(seconds / TICK)

    def _segments(self, segments: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
        before = 0.0
        found = []
        for number, one in enumerate(segments):
            start, end = float(one["start"]), float(one["end"])
            if not before <= start + TICK / 2 or end < start:
                raise DataError(
                    f"segments[{number}] is from {start:g} to {end:g} s, the one before ends at {before:g}: they must "
                    "be in order, without overlapping"
                )
            if end > self.seconds + TICK / 2:
                raise DataError(f"segments[{number}] ends at {end:g} s: the model hears {self.seconds:g} s at a time")
            before = end
            found.append((start, end, str(one["text"])))
        return found


def labels_of(model: Any, processor: Any, settings: SttSettings, name: str) -> Labels:
    """What writes the labels of a model's rows.

    Raises:
        ModelError: the tokenizer is not Whisper's.
    """
    features = processor.feature_extractor
    seconds = features.n_samples / features.sampling_rate
    return Labels(vocabulary_of(model, processor.tokenizer, name), processor.tokenizer, settings, seconds, name)
