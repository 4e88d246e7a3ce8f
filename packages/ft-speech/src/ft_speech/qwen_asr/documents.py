"""Recordings and what is said in them as documents of tokens: every recording as many tokens as the model hears of it.

How many follows from the recording's length alone, so that only headers are read here (an mp3 is decoded: its header
need not say how long it is); the samples are read when a batch is made (:mod:`ft_speech.qwen_asr.collating`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ft_core.console import counted
from ft_core.data import Packed, Tokenized
from ft_core.data.rendering import Draft, Renderer
from ft_core.data.tokenizing import RowTokenizer
from ft_core.errors import DataError
from ft_core.training.job import LEFT_OUT
from ft_speech.listening.recordings import SAID, looked_at
from ft_speech.qwen_asr.languages import name_of
from ft_speech.qwen_asr.loading import settings_of
from ft_speech.qwen_asr.parts import CHUNK_TOKENS, SAMPLING_RATE, audio_tokens, written

if TYPE_CHECKING:
    from ft_core.training import Job

__all__ = ["RECORDINGS", "AsrRenderer", "Heard", "dataset", "heard_in", "left_out", "tokenize"]

RECORDINGS = "recordings"
"""The column with a row's recordings, one for each of its documents: objects with ``audio``, a reference, ``start`` and
``end`` of the stretch that is meant, in seconds, ``samples``, how many it has at 16 kHz, and ``varied``, whether it is
augmented."""

BATCH = 64
"""Rows that are written together."""

Row = Mapping[str, Any]


class Heard(NamedTuple):
    """A stretch of a recording: which, from where to where in seconds (None: its beginning, its end)."""

    audio: str
    start: float | None
    end: float | None

    @classmethod
    def of(cls, row: Row) -> Heard:
        """That of a row in its normal form."""
        return cls(row["audio"], row.get("start"), row.get("end"))


class AsrRenderer(Renderer):
    """Writes a recording and what is said in it as text, by the processor's chat template and its word for audio.

    Args:
        processor: the model's, as :func:`ft_speech.qwen_asr.loading.load_processor` gives it.
        language: the code of the language of rows that name none; None: it is not known.

    Attributes:
        samples: how many samples at 16 kHz each recording has, to be filled before rows with them are written.
        left_out: the numbers of rows that were left out for their recordings.

    Raises:
        DataError: the chat template has not one place for a recording.
    """

    def __init__(self, processor: Any, language: str | None = None) -> None:
        super().__init__(processor.tokenizer, processor)
        self.processor, self.language = processor, language
        self.samples: dict[Heard, int] = {}
        self.left_out: list[int] = []
        self._around = self.around()

    def around(self, context: str | None = None) -> tuple[str, str]:
        """What stands before a recording's tokens and after them, up to where the model begins to write.

        Args:
            context: words that may be expected; None: none.

        Raises:
            DataError: the chat template has not one place for a recording, or the context holds one of the model's own
                tokens.
        """
        self._check_text("the prompt", context or "")
        asked: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "audio", "audio": "recording.wav"}]}]
        if context:
            asked.insert(0, {"role": "system", "content": context})
        parts = self._render(asked, None, prompting=True).split(self.processor.audio_token)
        if len(parts) != 2:
            raise DataError(
                f"the chat template writes {counted(len(parts) - 1, 'place')} for a recording instead of one: it is "
                "not that of a recogniser"
            )
        return parts[0], parts[1]

    def prompt(self, row: Row) -> tuple[str, str | None]:
        """What the model is asked of a row's recording, and what is said in it."""
        return self.question(Heard.of(row)), str(row["text"]).strip()

    def question(self, heard: Heard) -> str:
        """What the model is asked of a recording, up to where it begins to write."""
        before, after = self._around
        return f"{before}{self.processor.audio_token * audio_tokens(self.samples[heard])}{after}"

    def answer(self, row: Row) -> str:
        """What the model is to write of a row's recording.

        Raises:
            DataError: its language is not known.
        """
        code = row.get("language") or self.language
        return written(row["text"], None if code is None else name_of(code))

    def drafts(self, row: Row) -> list[Draft]:
        """One document, its answer trained; never to be cut in two.

        Raises:
            DataError: the row is to be translated, its language is not known, or its text holds one of the model's own
                tokens.
        """
        if row.get("task") == "translate":
            raise DataError("task is translate: Qwen3-ASR writes down what is said, in its language")
        self._check_text("text", row["text"])
        prompt = self.question(Heard.of(row))
        text = prompt + self.answer(row)
        start = len(self._around[0])
        shown = ((start, len(prompt) - len(self._around[1])),)
        return [Draft(text, ((len(prompt), len(text)),), end=True, uncuttable=True, shown=shown)]

    def _check_text(self, what: str, text: str) -> None:
        if (found := next((token for token in self.special if token in text), None)) is not None:
            raise DataError(f"{what} holds {found!r}, which means something else to the model")


def tokenize(
    rows: Sequence[Row],
    renderer: AsrRenderer,
    *,
    max_length: int,
    train_on: Literal["answers", "all"] = "answers",
    on_bad_audio: Literal["stop", "skip"] = "stop",
) -> tuple[Tokenized, list[str]]:
    """Documents of rows in normal form, and a line for each row that was left out for its recording.

    Only headers are read, save of an mp3, and where bad recordings are skipped: what is damaged shows in the samples
    alone, so that each recording is then decoded once.

    Raises:
        DataError: a row cannot be written, or, unless they are skipped, has a recording that cannot be used; with its
            number.
    """
    result = Tokenized()
    adding = RowTokenizer(renderer.processor.tokenizer, max_length, train_on, renderer)
    bad: list[str] = []
    skip = on_bad_audio == "skip"
    most = max_length / CHUNK_TOKENS + 2  # a chunk of a second has CHUNK_TOKENS, the last one perhaps fewer
    looks = zip(enumerate(rows), looked_at(rows, whole=skip, most=most), strict=True)
    while batch := list(islice(looks, BATCH)):
        good = []
        for (number, row), look in batch:
            if look.fault is None:
                renderer.samples[Heard.of(row)] = round(look.seconds * SAMPLING_RATE)
                good.append((number, row))
            elif skip:
                bad.append(f"row {number + 1}: {look.fault}")
                renderer.left_out.append(number)
            else:
                raise DataError(f"row {number + 1}: {look.fault} (stt.on_bad_audio: skip leaves such rows out)")
        adding(good, result)
    return result, bad


def dataset(job: Job, rows: Sequence[Row], name: str) -> Any:
    """Training rows, packed up to ``max_length`` where packing is on; see :attr:`ft_core.plugins.ModalitySpec.dataset`.

    Returns:
        a ``datasets.Dataset``, with the columns that :class:`ft_speech.qwen_asr.collating.AsrCollator` takes.

    Raises:
        DataError: as :func:`tokenize`; or no row is left.
    """
    config, settings, what = job.config, settings_of(job.config), name.replace("_", "-")
    renderer = AsrRenderer(job.processor, settings.language)
    tokens, bad = tokenize(
        rows,
        renderer,
        max_length=config.max_length,
        train_on=getattr(job.settings, "train_on", "answers"),
        on_bad_audio=settings.on_bad_audio,
    )
    job.kept[LEFT_OUT] = {**job.kept.get(LEFT_OUT, {}), name: renderer.left_out}
    for line in left_out(tokens, bad, what, config.max_length):
        job.say(line)
    job.kept[SAID] = name == "held_out"
    if not len(tokens):
        raise DataError(
            f"none of {counted(len(rows), f'{what} row')} can be trained on: {tokens.left_out} longer than max_length "
            f"{config.max_length}, {len(bad)} with a recording that cannot be used"
        )
    heard = [heard_in(rows[row], renderer, varied=name == "train") for row in tokens.row_of]
    job.counts |= {f"{name}_tokens": tokens.tokens}
    if name == "train":
        job.counts |= {
            "trained_tokens": tokens.trained_tokens,
            "overlong_rows": tokens.overlong,
            "dropped_rows": tokens.dropped + len(bad),
            "bad_audio_rows": len(bad),
            "audio_seconds": round(sum(one["samples"] for one in heard) / SAMPLING_RATE),
        }
    packed = Packed(tokens, config.max_length).documents if config.packing else [[i] for i in range(len(tokens))]
    return tokens.dataset(packed).add_column(RECORDINGS, [[heard[i] for i in row] for row in packed])


def left_out(tokens: Tokenized, bad: Sequence[str], what: str, max_length: int) -> list[str]:
    """Lines on the rows, called ``what``, that :func:`tokenize` left out, for their recordings or for their length."""
    lines = [f"left out: {what} {line}" for line in bad[:3]]
    if len(bad) > 3:
        lines.append(f"left out: {counted(len(bad), f'{what} row')} in all with a recording that cannot be used")
    if tokens.left_out:
        verb = "is" if tokens.left_out == 1 else "are"
        lines.append(
            f"{counted(tokens.left_out, f'{what} row')} {verb} longer than max_length {max_length} and left out: raise "
            "max_length (a second is 13 tokens)"
        )
    return lines


def heard_in(row: Row, renderer: AsrRenderer, *, varied: bool = False) -> dict[str, Any]:
    """A row's recording, as it stands in the column :data:`RECORDINGS`."""
    heard = Heard.of(row)
    return {**heard._asdict(), "samples": renderer.samples[heard], "varied": varied}
