"""Whisper as a recogniser: transformers' own ``generate``, window by window or through a whole recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_core.errors import DataError
from ft_core.memory import enough_memory
from ft_speech.listening.recogniser import LongForm, Timestamps, check_task
from ft_speech.listening.transcripts import Segment, Transcript, Word, joined, ordered, together
from ft_speech.listening.windows import at_pauses, is_silent
from ft_speech.whisper.aligning import token_times, words_of
from ft_speech.whisper.asking import FALLBACK, Frames, chances_kept, generation_of, processor_of
from ft_speech.whisper.vocabulary import Vocabulary, language_code, vocabulary_of

if TYPE_CHECKING:
    from ft_core.models.opening import Target

__all__ = ["WhisperRecogniser"]

Samples: TypeAlias = npt.NDArray[np.float32]

PREFIX = 4
"""Tokens before a text, at most: the start, the language, the task, and that there are no timestamps."""

LESS_MEMORY = "take a smaller --batch-size, or free memory that other programs hold"


@dataclass(eq=False)
class _Window:
    """A stretch of one recording that is heard at once.

    Attributes:
        file: the recording's number. start: where it begins there, in seconds.
        heard: what is said in it. tokens: those of the text of each of its segments.
    """

    file: int
    start: float
    samples: Samples
    language: str | None = None
    heard: Transcript = field(default_factory=lambda: Transcript(""))
    tokens: list[list[int]] = field(default_factory=list)


@dataclass(eq=False)
class _Stretch:
    """A part of a window, as a window of its own, with the words of its segments."""

    of: _Window
    window: _Window
    words: list[list[Word]] = field(default_factory=list)


class WhisperRecogniser:
    """A Whisper model, opened; a :class:`ft_speech.listening.recogniser.Recogniser`.

    Args:
        model: transformers' Whisper, an adapter on it perhaps. tokenizer, features: its own.
        name: what to call it.
    """

    def __init__(self, model: Any, tokenizer: Any, features: Any, name: str) -> None:
        self.model, self.tokenizer, self.features, self.name = model.eval(), tokenizer, features, name
        # PEFT's wrapper hands generate on to this, with the adapter in its layers.
        self._plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.vocabulary: Vocabulary = vocabulary_of(self._plain, tokenizer, name)
        self._special = {*tokenizer.all_special_ids}
        self.sampling_rate: int = features.sampling_rate
        self._frames = 2 * self._plain.config.max_source_positions
        self.longest = self._frames * features.hop_length / features.sampling_rate
        """Seconds of a window: 30 in all of OpenAI's models."""

    @classmethod
    def open(cls, target: Target, say: Callable[[str], None] = print) -> Self:
        """Load a Whisper model or a run of one; see :meth:`ft_speech.listening.recogniser.Recogniser.open`."""
        from transformers import AutoModelForSpeechSeq2Seq

        from ft_core.models.opening import open_target

        model, tokenizer = open_target(target, auto=AutoModelForSpeechSeq2Seq, say=say)
        return cls(model, tokenizer, processor_of(target, model), target.reference)

    def check(
        self,
        *,
        language: str | None,
        task: str,
        timestamps: Timestamps,
        long_form: LongForm = "pauses",
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """As :meth:`ft_speech.listening.recogniser.Recogniser.check`."""
        check_task(task, timestamps, long_form)
        if language is not None:
            language_code(language, self.vocabulary.languages, self.name)
        if task == "translate" and not self.vocabulary.tasks:
            raise DataError(f"task: 'translate': {self.name} knows English alone (allowed: transcribe)")
        if timestamps == "word" and not self.vocabulary.heads:
            raise DataError(
                f"timestamps: 'word': {self.name} does not say which heads follow the words (alignment_heads in its "
                "generation_config.json; allowed: none, segment)"
            )
        said = [token for token in self._prompt(prompt)[1:] if self._is_special(token)]
        if said:
            word = self.tokenizer.convert_ids_to_tokens(said[0])
            raise DataError(f"prompt: {word} is a token by which {self.name} is told what to do: leave it out")
        room = self._room(prompt)
        if room < 1:
            raise DataError(
                f"prompt: {len(self._prompt(prompt))} tokens leave the {self._plain.config.max_target_positions} "
                f"positions of {self.name} no room for a text: shorten it"
            )
        if max_new_tokens is not None and not 1 <= max_new_tokens <= room:
            raise DataError(
                f"max_new_tokens: {max_new_tokens} (allowed: 1 to {room}, the positions of {self.name}"
                f"{' less the prompt' if prompt else ''})"
            )

    def transcribe(
        self,
        samples: Sequence[Samples],
        *,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: Timestamps = "none",
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 8,
        long_form: LongForm = "pauses",
        progress: Callable[[float], None] | None = None,
    ) -> list[Transcript]:
        """As :meth:`ft_speech.listening.recogniser.Recogniser.transcribe`.

        What is longer than a window is cut at pauses and heard in batches (``long_form="pauses"``), each window with
        the prompt; or heard in one pass by the paper's algorithm, where the last timestamp of a window says where the
        next begins (``sequential``): one recording after the other, and only with what predicts timestamps.
        """
        self.check(
            language=language, task=task, timestamps=timestamps, long_form=long_form, prompt=prompt,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        report = progress or (lambda seconds: None)
        new = max_new_tokens or self._room(prompt)
        settings: dict[str, Any] = {"task": task, "timestamps": timestamps, "prompt": prompt, "new": new}
        windows: list[_Window] = []
        whole: list[_Window] = []
        for number, one in enumerate(samples):
            found = at_pauses(one, self.sampling_rate, self.longest)
            if long_form == "sequential" and len(found) > 1 and not is_silent(one):
                whole.append(_Window(number, 0.0, one))
            else:
                windows += [_Window(number, a / self.sampling_rate, one[a:b]) for a, b in found]
        with chances_kept(self._plain.device):
            self._tell_languages([*windows, *whole], language, batch_size)
            for batch in _batches([one for one in windows if not is_silent(one.samples)], batch_size):
                self._hear(batch, **settings)
                report(sum(self._seconds(one) for one in batch))
            for one in whole:
                frames = Frames(report, self.longest / self._frames)
                self._hear([one], report=frames, **settings)
                frames(np.array([[len(one.samples) // self.features.hop_length, 0]]))
        report(sum(self._seconds(one) for one in windows if is_silent(one.samples)))
        parts: list[list[_Window]] = [[] for _ in samples]
        for one in (*windows, *whole):
            parts[one.file].append(one)
        return [
            joined([(one.start, one.heard) for one in found], _language(found), translated=task == "translate")
            for found in parts
        ]

    # -- one batch of windows --------------------------------------------------------------------------------------

    def _hear(
        self,
        batch: Sequence[_Window],
        *,
        task: str,
        timestamps: Timestamps,
        prompt: str | None,
        new: int,
        report: Frames | None = None,
    ) -> None:
        """Hear windows together, or one whole recording, and leave the transcripts in them."""
        import torch

        features = self._features(batch)
        options: dict[str, Any] = {}
        if self.vocabulary.languages:
            options |= {"language": [one.language for one in batch], "task": task}
        if prompt:
            options["prompt_ids"] = torch.tensor(self._prompt(prompt), device=self._plain.device)
        with enough_memory(f"hearing {len(batch)} x {self.longest:g} s", LESS_MEMORY), torch.inference_mode():
            made = self._plain.generate(
                input_features=features,
                generation_config=generation_of(self._plain, self.vocabulary),
                return_timestamps=timestamps != "none" or features.shape[-1] > self._frames,
                return_segments=True,
                max_new_tokens=new,
                use_cache=True,
                monitor_progress=report,
                **FALLBACK,
                **options,
            )
            for one, segments in zip(batch, made["segments"], strict=True):
                self._read(one, segments, task, timed=timestamps != "none")
            del made
            if timestamps == "word":
                self._add_words(batch, features, task)

    def _read(self, window: _Window, segments: Sequence[dict[str, Any]], task: str, *, timed: bool) -> None:
        """Leave in a window what transformers makes of it: its segments, and the tokens of their texts."""
        ends: dict[int, bool] = {}  # by the call that wrote it, whether a text was ended
        found = []
        for one in segments:
            written = one["result"]["sequences"][one["idxs"][0] :]
            ends.setdefault(id(one["result"]), bool((written == self.vocabulary.end).any()))
            ids = [int(token) for token in one["tokens"]]
            ids = [token for token in ids if not self._is_special(token)]
            found.append((Segment(float(one["start"]), float(one["end"]), self.tokenizer.decode(ids).strip()), ids))
        seconds = self._seconds(window)
        # What begins after a recording's end was heard in the padding.
        found = [(one, ids) for one, ids in found if one.text and (not timed or one.start < seconds)]
        window.tokens = [ids for _, ids in found]
        window.heard = Transcript(
            text=together([(one.text, _written(window, task)) for one, _ in found]),
            language=window.language,
            segments=ordered([one for one, _ in found], seconds) if timed else (),
            cut=sum(not ended for ended in ends.values()),
        )

    def _add_words(self, batch: Sequence[_Window], features: Any, task: str) -> None:
        """Put the words into the segments of windows that were heard."""
        stretches = [one for window in batch for one in self._stretches(window)]
        for some in _batches(stretches, max(len(batch), 1)):
            # A window's features are there already, unless it is a whole recording.
            same = [id(one.of) for one in some] == [id(one) for one in batch] and features.shape[-1] == self._frames
            spectra = features if same else self._features([one.window for one in some])
            times = token_times(
                self._plain,
                self.vocabulary,
                spectra,
                [min(round(self._seconds(one.window) / self._step) * 2, self._frames) for one in some],
                [[token for text in one.window.tokens for token in text] for one in some],
                [self.vocabulary.prefix(one.window.language, task) for one in some],
                self._step,
            )
            for one, place in zip(some, times, strict=True):
                words = words_of(one.window.tokens, place, self.tokenizer, _written(one.window, task))
                one.words = words
        for window in batch:
            words = [_moved(found, one.window.start) for one in stretches if one.of is window for found in one.words]
            # The words' times are nearer than the segment's own, which lie where a pause may end as well as begin.
            whole = [
                replace(segment, start=found[0].start, end=found[-1].end, words=tuple(found)) if found else segment
                for segment, found in zip(window.heard.segments, words, strict=True)
            ]
            window.heard = replace(window.heard, segments=ordered(whole, self._seconds(window)))

    def _stretches(self, window: _Window) -> list[_Stretch]:
        """A window in parts that the model hears at once, each of whole segments."""
        parts: list[_Stretch] = []
        room = self._room(None)
        for segment, ids in zip(window.heard.segments, window.tokens, strict=True):
            last = parts[-1] if parts else None
            if (
                last is None
                or segment.end - last.window.start > self.longest
                or sum(map(len, last.window.tokens)) + len(ids) > room
            ):
                begin = segment.start if self._seconds(window) > self.longest else 0.0
                first = round(begin * self.sampling_rate)
                most = first + round(self.longest * self.sampling_rate)
                part = _Window(window.file, begin, window.samples[first:most], window.language, tokens=[])
                last = _Stretch(window, part)
                parts.append(last)
            last.window.tokens.append(ids)
        return parts

    # -- what the model takes --------------------------------------------------------------------------------------

    @property
    def _step(self) -> float:
        """Seconds of a position of the encoder, of which each is two frames: 0.02."""
        return float(2 * self.features.hop_length / self.features.sampling_rate)

    def _seconds(self, window: _Window) -> float:
        return len(window.samples) / self.sampling_rate

    def _features(self, windows: Sequence[_Window]) -> Any:
        """Log-mel spectra ``[windows, mels, frames]``: of the model's length; one longer recording's as long as it."""
        samples = [one.samples for one in windows]
        most = self._frames * self.features.hop_length
        longer = len(samples) == 1 and len(samples[0]) > most
        how = {"truncation": False, "padding": "longest"} if longer else {"max_length": most}
        made = self.features(samples, sampling_rate=self.sampling_rate, return_tensors="pt", **how)
        weight = self._plain.get_encoder().conv1.weight
        return made["input_features"].to(weight.device, weight.dtype)

    def _prompt(self, prompt: str | None) -> list[int]:
        if not prompt:
            return []
        text = self.tokenizer(f" {prompt.strip()}", add_special_tokens=False)["input_ids"]
        return [self.vocabulary.previous, *text]

    def _is_special(self, token: int) -> bool:
        """Whether a token is no text: a timestamp, or one of those that begin and end."""
        return token >= self.vocabulary.first_time or token in self._special

    def _room(self, prompt: str | None) -> int:
        """How many tokens a text may have."""
        return int(self._plain.config.max_target_positions) - PREFIX - len(self._prompt(prompt))

    def _tell_languages(self, windows: Sequence[_Window], language: str | None, batch_size: int) -> None:
        """Say of each window what language is spoken in its recording; where it is not told, its beginning tells."""
        import torch

        known = self.vocabulary.languages
        told = "en" if not known else None if language is None else language_code(language, known, self.name)
        found: dict[int, str] = {}
        if told is None:
            first: dict[int, _Window] = {}
            for one in windows:
                if not is_silent(one.samples):
                    first.setdefault(one.file, one)
            numbers = torch.tensor(list(known.values()))
            for batch in _batches(list(first.values()), batch_size):
                begun = [replace(one, samples=one.samples[: round(self.longest * self.sampling_rate)]) for one in batch]
                with enough_memory(f"hearing {len(batch)} x {self.longest:g} s", LESS_MEMORY), torch.inference_mode():
                    features = self._features(begun)
                    start = torch.full((len(batch), 1), self.vocabulary.start, device=features.device)
                    scores = self._plain(input_features=features, decoder_input_ids=start, use_cache=False).logits[
                        :, -1
                    ]
                best = scores.cpu()[:, numbers].argmax(-1).tolist()
                found |= {one.file: [*known][number] for one, number in zip(batch, best, strict=True)}
        for one in windows:
            one.language = told or found.get(one.file)


def _language(windows: Sequence[_Window]) -> str | None:
    return next((one.language for one in windows if one.language is not None), None)


def _written(window: _Window, task: str) -> str | None:
    """The language of a window's text, which of a translation is not that of its sound."""
    return "en" if task == "translate" else window.language


def _moved(words: Sequence[Word], by: float) -> list[Word]:
    return [replace(word, start=word.start + by, end=word.end + by) for word in words]


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
