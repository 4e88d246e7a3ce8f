"""Qwen3-ASR as a recogniser: long recordings cut at their pauses, and heard in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_core.data import Collator
from ft_core.errors import DataError
from ft_core.memory import enough_memory
from ft_speech.listening.recogniser import LongForm, Timestamps, check_task
from ft_speech.listening.transcripts import Segment, Transcript, joined
from ft_speech.listening.windows import at_pauses, is_silent
from ft_speech.qwen_asr.collating import collator_for
from ft_speech.qwen_asr.documents import AsrRenderer
from ft_speech.qwen_asr.languages import code_of, name_of, told
from ft_speech.qwen_asr.loading import load_processor
from ft_speech.qwen_asr.parts import SAMPLING_RATE, audio_tokens, parsed, written

if TYPE_CHECKING:
    from ft_core.models.opening import Target

__all__ = ["WINDOWS", "QwenRecogniser"]

Samples: TypeAlias = npt.NDArray[np.float32]

WINDOWS = {"none": 180.0, "segment": 30.0}
"""The longest window, in seconds, by the timestamps that are asked for: the model writes none, so that a segment is
what lies between two pauses. (It hears up to 20 minutes at once; what goes wrong goes wrong for a window.)"""
WRITTEN = 20
"""Tokens that are written at most for a second of speech, and a few more: people say up to ten syllables a second."""
LESS_MEMORY = "take a smaller --batch-size, or free memory that other programs hold"


@dataclass(eq=False)
class _Window:
    """A stretch of one recording that is heard at once.

    Attributes:
        file: the recording's number. start: where it begins there, in seconds. heard: what is said in it.
    """

    file: int
    start: float
    samples: Samples
    heard: Transcript = field(default_factory=lambda: Transcript(""))

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLING_RATE


class QwenRecogniser:
    """A Qwen3-ASR, opened; a :class:`ft_speech.listening.recogniser.Recogniser`.

    Args:
        model: transformers' model, an adapter on it perhaps. processor: as
            :func:`ft_speech.qwen_asr.loading.load_processor` gives it. name: what to call it.
    """

    sampling_rate: int = SAMPLING_RATE

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model.eval(), processor, name
        self._renderer = AsrRenderer(processor)
        self._collate = collator_for(model, processor, Collator(processor.tokenizer.pad_token_id))

    @classmethod
    def open(cls, target: Target, say: Callable[[str], None] = print) -> Self:
        """Load a Qwen3-ASR or a run of one; see :meth:`ft_speech.listening.recogniser.Recogniser.open`."""
        from transformers import AutoModelForSpeechSeq2Seq

        from ft_core.models.opening import open_target
        from ft_core.models.source import find_model

        if target.run is None:
            assert target.source is not None
            source = target.source
        else:
            source = find_model(str(target.run.model) if target.run.model.is_dir() else target.run.config.model)
        model, tokenizer = open_target(target, auto=AutoModelForSpeechSeq2Seq, say=say)
        return cls(model, load_processor(source, None, tokenizer), target.reference)

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
        if task == "translate":
            raise DataError(
                f"task: 'translate': {self.name} writes in the language that it hears (allowed: transcribe)"
            )
        if timestamps == "word":
            raise DataError(f"timestamps: 'word': {self.name} does not write times (allowed: none, segment)")
        if long_form == "sequential":
            raise DataError(f"long_form: 'sequential': {self.name} does not write times (allowed: pauses)")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise DataError(f"max_new_tokens: {max_new_tokens} (allowed: 1 or more)")
        if language is not None:
            told(language)
        self._renderer.around(prompt)

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

        The prompt is the model's context: words and names that may be expected. A language that is told is put before
        the answer, as the model would write it. Where no ``max_new_tokens`` is given, an answer may have
        :data:`WRITTEN` tokens for each second of its window.
        """
        self.check(
            language=language, task=task, timestamps=timestamps, long_form=long_form, prompt=prompt,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        report = progress or (lambda seconds: None)
        code = None if language is None else told(language)
        windows = [
            _Window(number, first / SAMPLING_RATE, np.asarray(one[first:last], np.float32))
            for number, one in enumerate(samples)
            for first, last in at_pauses(one, SAMPLING_RATE, WINDOWS[timestamps])
        ]
        loud = [one for one in windows if not is_silent(one.samples)]
        report(sum(one.seconds for one in windows) - sum(one.seconds for one in loud))
        for batch in _batches(sorted(loud, key=lambda one: -len(one.samples)), batch_size):
            self._hear(batch, code, prompt, max_new_tokens, timed=timestamps != "none")
            report(sum(one.seconds for one in batch))
        parts: list[list[tuple[float, Transcript]]] = [[] for _ in samples]
        for one in windows:
            parts[one.file].append((one.start, one.heard))
        return [joined(found, code) for found in parts]

    def _hear(
        self, batch: Sequence[_Window], code: str | None, prompt: str | None, new: int | None, timed: bool
    ) -> None:
        """Hear windows together, and leave the transcripts in them."""
        import torch
        from transformers import GenerationConfig

        from ft_core.generation import stop_ids

        tokenizer = self.processor.tokenizer
        before, after = self._renderer.around(prompt)
        after += "" if code is None else written("", name_of(code))
        texts = [f"{before}{self.processor.audio_token * audio_tokens(len(one.samples))}{after}" for one in batch]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stops = stop_ids(self.model, tokenizer)
        longest = new or math.ceil(WRITTEN * max(one.seconds for one in batch)) + 32
        settings = GenerationConfig(
            max_new_tokens=longest, do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
        )
        seconds = max(one.seconds for one in batch)
        with enough_memory(f"hearing {len(batch)} x {seconds:.0f} s", LESS_MEMORY), torch.inference_mode():
            given = self._collate.left_padded(prompts) | self._collate.spectra_of([one.samples for one in batch])
            given = {name: value.to(self.model.device) for name, value in given.items()}
            made = self.model.generate(**given, generation_config=settings, use_cache=True)
        for one, tokens in zip(batch, made[:, given["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(tokens) if token in stops), None)
            answer = parsed(tokenizer.decode(tokens[:end], skip_special_tokens=True))
            segments = (Segment(0.0, one.seconds, answer.text),) if timed and answer.text else ()
            one.heard = Transcript(answer.text, code or code_of(answer.language), segments, cut=int(end is None))


def _batches(items: Sequence[_Window], size: int) -> Iterator[Sequence[_Window]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
