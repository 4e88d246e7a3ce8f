"""Rows as documents of a CSM: the tokens of a text, and the frames of how it is spoken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ft_core.console import counted
from ft_core.data import pack
from ft_core.errors import DataError, FtError
from ft_core.training.job import LEFT_OUT
from ft_speech.csm.encoding import Encoder, TooLong
from ft_speech.csm.loading import plain
from ft_speech.csm.settings import csm_of, tts_of
from ft_speech.csm.turns import number_speakers, read_speakers, speaker_of, text_ids, voices_of, write_speakers
from ft_speech.listening.recordings import SAID
from ft_speech.speaking.recordings import clipped_line

if TYPE_CHECKING:
    from ft_core.evaluation import EvaluationJob
    from ft_core.training import Job

__all__ = [
    "CODES",
    "END",
    "HEARD",
    "KINDS",
    "SPOKEN",
    "TEXT",
    "Document",
    "Documents",
    "dataset",
    "join",
    "make",
    "say_left_out",
    "turn",
]

CODES = "codes"
"""The column with the codes of a row's frames, one frame after the other."""
KINDS = "kinds"
"""The column that says what each place of a row is."""
TEXT, HEARD, SPOKEN, END = range(4)
"""A token of text; a frame of a turn before, which is not trained; a frame that is; the one that ends those."""

BATCH = 16
"""Rows whose recordings are read together."""
THREADS = 4

Row = Mapping[str, Any]
Codes: TypeAlias = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Document:
    """One row as the model reads it.

    Attributes:
        ids: text tokens, and at frames the token that stands for one, [places].
        kinds: of each place, ``TEXT``, ``HEARD``, ``SPOKEN`` or ``END``, [places].
        codes: of the frames, int16 [frames, codebooks].
    """

    ids: list[int]
    kinds: list[int]
    codes: Codes

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Documents:
    """Documents of rows, and what became of the others.

    Attributes:
        documents: in the rows' order. row_of: for each the index of its row.
        bad: a line for each row with a recording that cannot be used; ``left_out`` their indices.
        overlong: how many rows are longer than is allowed.
        frames: that are trained on, in all. clipped: recordings that were read for them and are clipped.
    """

    documents: list[Document] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    overlong: int = 0
    frames: int = 0
    clipped: int = 0


def make(
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    encoder: Encoder,
    *,
    max_length: int,
    speakers: Mapping[str, int],
    max_seconds: float = math.inf,
    on_bad_audio: Literal["stop", "skip"] = "stop",
) -> Documents:
    """Documents of rows in normal form (:mod:`ft_speech.speaking.rows`); what is too long is left out.

    Raises:
        DataError: a voice is not known, a text holds a token for audio, or, unless such rows are skipped, a recording
            cannot be used; with the row's number.
    """
    made, config = Documents(), plain(model).config
    most = int(min(max_length, max_seconds * encoder.frame_rate))
    numbered = iter(enumerate(rows))
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(numbered, BATCH)):
            read = pool.map(lambda item: _read(item[1], encoder, most), batch)
            for (number, row), samples in zip(batch, read, strict=True):
                if isinstance(samples, TooLong):
                    made.overlong += 1
                    continue
                if isinstance(samples, FtError):
                    if on_bad_audio == "stop":
                        raise DataError(f"row {number + 1}: {samples} (tts.on_bad_audio: skip leaves such rows out)")
                    made.bad.append(f"row {number + 1}: {samples}")
                    made.left_out.append(number)
                    continue
                try:
                    document = _document(row, samples, config, tokenizer, encoder, speakers)
                except DataError as error:
                    raise DataError(f"row {number + 1}: {error}") from None
                if len(document) > max_length:
                    made.overlong += 1
                    continue
                made.clipped += sum(one.clipped for one in samples if one is not None)
                made.documents.append(document)
                made.row_of.append(number)
                made.frames += document.kinds.count(SPOKEN)
    return made


def turn(ids: list[int], codes: Codes | None, config: Any, *, trained: bool) -> Document:
    """A turn: its text, and the frames of how it is spoken with the one that ends them; or its text alone."""
    empty = np.zeros((0, config.num_codebooks), np.int16)
    if codes is None:
        return Document(ids, [TEXT] * len(ids), empty)
    end = np.full((1, config.num_codebooks), config.codebook_eos_token_id, np.int16)
    kinds = [SPOKEN if trained else HEARD] * len(codes) + [END if trained else HEARD]
    frames = [config.audio_token_id] * len(codes) + [config.audio_eos_token_id]
    return Document([*ids, *frames], [TEXT] * len(ids) + kinds, np.concatenate([codes, end]))


def join(turns: Sequence[Document]) -> Document:
    """Turns one after the other."""
    return Document(
        [number for one in turns for number in one.ids],
        [kind for one in turns for kind in one.kinds],
        np.concatenate([one.codes for one in turns]),
    )


def dataset(job: Job, rows: Sequence[Row], name: str) -> Any:
    """Training rows, packed up to ``max_length`` where packing is on; see :attr:`ft_core.plugins.ModalitySpec.dataset`.

    Returns:
        a ``datasets.Dataset``, with the columns that :class:`ft_speech.csm.collating.CsmCollator` takes.

    Raises:
        DataError: as :func:`make`; or no row is left.
    """
    config, what = job.config, name.replace("_", "-")
    tokenizer: Any = job.tokenizer
    if name == "train":
        write_speakers(tokenizer, number_speakers(voices_of(rows), csm_of(config), read_speakers(tokenizer)))
        _say_speakers(job, rows)
    encoder = Encoder(job.model, job.kept, tts_of(config).trim_silence)
    made = make(
        rows, job.model, tokenizer, encoder, max_length=config.max_length, speakers=read_speakers(tokenizer),
        max_seconds=tts_of(config).max_seconds, on_bad_audio=tts_of(config).on_bad_audio,
    )  # fmt: skip
    job.kept[LEFT_OUT] = {**job.kept.get(LEFT_OUT, {}), name: made.left_out}
    say_left_out(job, made, what)
    if name != "train":
        job.kept[SAID] = True
    if not made.documents:
        raise DataError(
            f"none of {counted(len(rows), f'{what} row')} can be trained on: {made.overlong} longer than max_length "
            f"{config.max_length} or tts.max_seconds, {len(made.bad)} with a recording that cannot be used"
        )
    lengths = [len(document) for document in made.documents]
    job.counts |= {f"{name}_tokens": sum(lengths)}
    if name == "train":
        job.counts |= {
            "trained_frames": made.frames,
            "trained_seconds": round(made.frames / encoder.frame_rate),
            "overlong_rows": made.overlong,
            "dropped_rows": made.overlong + len(made.bad),
            "bad_audio_rows": len(made.bad),
            "clipped_recordings": made.clipped,
        }
        if line := clipped_line(made.clipped, what):
            job.say(line)
    packed = pack(lengths, config.max_length) if config.packing else [[i] for i in range(len(lengths))]
    return _dataset([[made.documents[i] for i in row] for row in packed])


def _read(row: Row, encoder: Encoder, most: int) -> Any:
    """A row's recording and those before it, None for one that is known; or what is wrong."""
    found = []
    for each in (*(row.get("context") or ()), row):
        try:
            found.append(None if encoder.known(dict(each)) is not None else encoder.read(dict(each), most))
        except (FtError, TooLong) as error:
            return error
    return found


def _document(
    row: Row, samples: Sequence[Any], config: Any, tokenizer: Any, encoder: Encoder, speakers: Mapping[str, int]
) -> Document:
    turns = []
    for each, one in zip((*(row.get("context") or ()), row), samples, strict=True):
        given = dict(each)
        known = encoder.known(given)
        codes = encoder.encode(given, one.samples) if known is None else known
        speaker = speaker_of(given.get("voice"), speakers)
        ids = text_ids(given["text"], speaker, tokenizer, (config.audio_token_id, config.audio_eos_token_id))
        turns.append(turn(ids, codes, config, trained=each is row))
    return join(turns)


def _dataset(rows: list[list[Document]]) -> Any:
    import datasets
    import pyarrow as pa

    def lists(values: Iterator[Any], type: Any) -> Any:
        parts = [np.asarray(part, dtype=type.to_pandas_dtype()) for part in values]
        offsets = np.cumsum([0, *map(len, parts)])
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(parts), type))

    columns = {
        "input_ids": lists(([n for one in row for n in one.ids] for row in rows), pa.int32()),
        KINDS: lists(([kind for one in row for kind in one.kinds] for row in rows), pa.int8()),
        CODES: lists((np.concatenate([one.codes.reshape(-1) for one in row]) for row in rows), pa.int16()),
        "seq_lengths": lists(([len(one) for one in row] for row in rows), pa.int32()),
    }
    return datasets.Dataset(pa.table(columns))


def _say_speakers(job: Job, rows: Sequence[Row]) -> None:
    names = read_speakers(cast(Any, job.tokenizer))
    if names:
        shown = ", ".join(f"{name} is [{number}]" for name, number in list(names.items())[:8])
        job.say(f"speakers: {shown}{', …' if len(names) > 8 else ''}")
    if any(row.get("style") for row in rows):
        job.say("the rows have styles, which a csm has no place for: write them into the text, or leave them out")


def say_left_out(job: Job | EvaluationJob, made: Documents, what: str) -> None:
    """Lines on the rows that were left out, which are called so."""
    for line in made.bad[:3]:
        job.say(f"left out: {what} {line}")
    if len(made.bad) > 3:
        job.say(f"left out: {counted(len(made.bad), f'{what} row')} in all with a recording that cannot be used")
    if made.overlong:
        verb = "is" if made.overlong == 1 else "are"
        job.say(
            f"{counted(made.overlong, f'{what} row')} {verb} longer than max_length {job.config.max_length} (text and "
            f"12.5 frames a second) or tts.max_seconds {tts_of(job.config).max_seconds:g}, and left out"
        )
