"""Texts and recordings as documents of tokens: the text, and the codes of how it is spoken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ft_core.console import counted, progress
from ft_core.data import Packed, Tokenized
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError
from ft_core.training.job import LEFT_OUT
from ft_speech.audio import AudioError
from ft_speech.listening.recordings import SAID
from ft_speech.orpheus.loading import SpeechProcessor, settings_of
from ft_speech.orpheus.tokens import document, prompt_text, words_of
from ft_speech.speaking.recordings import Recording, clipped_line, key_of, read_recording

if TYPE_CHECKING:
    from ft_core.training import Job
    from ft_speech.codecs.protocol import Codes
    from ft_speech.speaking.settings import TtsSettings

__all__ = ["CODES", "Documents", "dataset", "documents"]

CODES = "speech_codes"
"""The key of ``job.kept`` under which the codes of recordings are, by :func:`ft_speech.speaking.recordings.key_of`."""
BATCH = 16
"""Recordings that are read ahead."""
THREADS = 4

Row = Mapping[str, Any]


@dataclass
class Documents:
    """Rows as documents of tokens.

    Attributes:
        tokens: the documents. seconds: of all their recordings.
        bad: by the number of the row, from 0, what is wrong with a recording that is no use.
        too_long: rows whose recording is longer than ``tts.max_seconds``.
        overlong: rows of more tokens than ``max_length``, the longest of ``longest``.
        clipped: recordings that were read for them and are clipped.
    """

    tokens: Tokenized = field(default_factory=Tokenized)
    seconds: float = 0.0
    bad: dict[int, str] = field(default_factory=dict)
    too_long: int = 0
    overlong: int = 0
    longest: int = 0
    clipped: int = 0

    def left_out(self, what: str, settings: TtsSettings, max_length: int) -> list[str]:
        """Lines on the rows that were left out."""
        lines = [f"left out: {what} {line}" for line in list(self.bad.values())[:3]]
        if len(self.bad) > 3:
            lines.append(f"left out: {counted(len(self.bad), f'{what} row')} in all with a recording that is no use")
        if self.too_long:
            lines.append(
                f"left out: {counted(self.too_long, f'{what} row')} with more than {settings.max_seconds:g} s of sound "
                "(tts.max_seconds)"
            )
        if self.overlong:
            lines.append(
                f"left out: {counted(self.overlong, f'{what} row')} of more than {max_length} tokens "
                f"(max_length; the longest has {self.longest}): half a sentence would be learnt as a whole one"
            )
        return lines


def documents(
    rows: Sequence[Row],
    processor: SpeechProcessor,
    settings: TtsSettings,
    *,
    max_length: int,
    kept: dict[bytes, Codes],
    show: bool = True,
) -> Documents:
    """Documents of rows in normal form. Each recording's codes are made once and kept.

    Args:
        kept: the codes of recordings, by :func:`ft_speech.speaking.recordings.key_of`; those that are made are added.
        show: whether progress is shown.

    Raises:
        DataError: a text that cannot be written, or, unless they are skipped, a recording that cannot be used; with the
            number of the row.
    """
    found = Documents()
    tokens, rate = processor.tokens, processor.codec.sample_rate
    shown = progress("recordings")
    made = 0
    total = sum(key_of(row) not in kept for row in rows)
    for number, (row, codes) in enumerate(_codes(rows, processor, settings, kept, found)):
        if isinstance(codes, str):
            if settings.on_bad_audio == "stop":
                raise DataError(f"row {number + 1}: {codes} (tts.on_bad_audio: skip leaves such rows out)")
            found.bad[number] = f"row {number + 1}: {codes}"
            continue
        if show and total:
            made = min(made + 1, total)
            shown(made, total)
        seconds = len(codes) * processor.codec.frame_samples / rate
        if seconds > settings.max_seconds + processor.codec.frame_samples / rate:
            found.too_long += 1
            continue
        try:
            words = words_of(processor.tokenizer, prompt_text(row, processor.prompt), tokens)
        except DataError as error:
            raise DataError(f"row {number + 1}: {error}") from None
        ids, asked = document(tokens, words, codes)
        if len(ids) > max_length:
            found.overlong += 1
            found.longest = max(found.longest, len(ids))
            continue
        hidden = asked if settings.train_on == "answers" else 0
        found.tokens.append(ids, [IGNORE] * hidden + ids[hidden:], number)
        found.seconds += seconds
    return found


def _codes(
    rows: Sequence[Row], processor: SpeechProcessor, settings: TtsSettings, kept: dict[bytes, Codes], found: Documents
) -> Iterator[tuple[Row, Codes | str]]:
    """Each row with its recording's codes, or with what is wrong with it. Files are read by several threads, codes made
    by one, in order, so that they do not depend on who was quicker; ``found`` counts which are clipped."""
    codec = processor.codec

    def read(row: Row) -> Recording | str | None:
        if key_of(row) in kept:
            return None
        try:
            samples, clipped = read_recording(row, codec.sample_rate, settings.trim_silence, settings.max_seconds + 1)
        except (AudioError, DataError) as error:
            return str(error)
        most = round((settings.max_seconds + 1) * codec.sample_rate) + 2 * codec.frame_samples
        # Enough to see that it is too long; a view would keep all that was read.
        return Recording(samples if len(samples) <= most else samples[:most].copy(), clipped)

    left = iter(rows)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(left, BATCH)):
            for row, heard in zip(batch, pool.map(read, batch), strict=True):
                if isinstance(heard, str):
                    yield row, heard
                    continue
                key = key_of(row)
                if heard is not None and key not in kept:
                    kept[key] = codec.encode(heard.samples).astype(np.int32)
                    found.clipped += heard.clipped
                yield row, kept[key]


def dataset(job: Job, rows: Sequence[Row], name: str) -> Any:
    """Training rows, packed up to ``max_length`` where packing is on; see :attr:`ft_core.plugins.ModalitySpec.dataset`.

    Returns:
        a ``datasets.Dataset``, with the columns that :class:`ft_core.data.Collator` takes.

    Raises:
        DataError: as :func:`documents`; or no row is left.
    """
    config, settings, what = job.config, settings_of(job.config), name.replace("_", "-")
    found = documents(rows, job.processor, settings, max_length=config.max_length, kept=job.kept.setdefault(CODES, {}))
    job.kept[LEFT_OUT] = {**job.kept.get(LEFT_OUT, {}), name: list(found.bad)}
    for line in found.left_out(what, settings, config.max_length):
        job.say(line)
    if name != "train":
        job.kept[SAID] = True
    if not len(found.tokens):
        raise DataError(
            f"none of {counted(len(rows), f'{what} row')} can be trained on: {len(found.bad)} with a recording that is "
            f"no use, {found.too_long} longer than tts.max_seconds {settings.max_seconds:g}, {found.overlong} longer "
            f"than max_length {config.max_length}"
        )
    job.counts |= {f"{name}_tokens": found.tokens.tokens}
    if name == "train":
        job.counts |= {
            "trained_tokens": found.tokens.trained_tokens,
            "overlong_rows": found.too_long + found.overlong,
            "bad_audio_rows": len(found.bad),
            "clipped_recordings": found.clipped,
            "audio_seconds": round(found.seconds),
        }
        if clipped := clipped_line(found.clipped, what):
            job.say(clipped)
        codec = job.processor.codec
        rate = len(codec.layout.sizes) * codec.sample_rate / codec.frame_samples
        job.say(
            f"{counted(len(found.tokens), 'recording')}, {found.seconds / 60:.1f} min of speech, {rate:.0f} tokens a "
            "second"
        )
    return Packed(found.tokens, config.max_length).dataset() if config.packing else found.tokens.dataset()
