"""Rows of recordings as what Whisper is trained on: references and labels; sound becomes features in the collator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ft_core.console import counted
from ft_core.errors import DataError
from ft_core.training.job import LEFT_OUT
from ft_speech.audio import SLACK as ROUNDED
from ft_speech.listening.recordings import SAID, looked_at
from ft_speech.whisper.labels import Labels, labels_of
from ft_speech.whisper.loading import settings_of

if TYPE_CHECKING:
    from ft_core.training import Job

__all__ = ["Examples", "dataset", "examples"]

SLACK = 0.01
"""Seconds by which a recording may be longer than what the model hears, and is cut: encoders' padding."""

Row = Mapping[str, Any]


@dataclass
class Examples:
    """What of some rows can be trained on.

    Attributes:
        rows: for each such row what :class:`ft_speech.whisper.collating.WhisperCollator` takes.
        numbers: the row of each.
        seconds: of all their recordings.
        bad: a line for each row that was left out for its recording, and their numbers.
        too_long: how many rows were left out because the model does not hear so long a recording.
        overlong: how many, because their labels are too many tokens.
        most: that many may be.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    seconds: float = 0.0
    bad: dict[int, str] = field(default_factory=dict)
    too_long: int = 0
    overlong: int = 0
    most: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row["labels"]) for row in self.rows)

    def left_out(self, what: str, seconds: float) -> list[str]:
        """Lines that say what was left out, of rows that are called so, by a model that hears so many seconds."""
        lines = [f"left out: {what} {line}" for line in list(self.bad.values())[:3]]
        if len(self.bad) > 3:
            lines.append(f"left out: {counted(len(self.bad), f'{what} row')} in all with a recording that is no use")
        if self.too_long:
            whose = "recording is" if self.too_long == 1 else "recordings are"
            lines.append(
                f"left out: {counted(self.too_long, f'{what} row')} whose {whose} longer than the {seconds:g} s that "
                "the model hears at a time: cut them into pieces, or give rows a start and an end"
            )
        if self.overlong:
            lines.append(
                f"left out: {counted(self.overlong, f'{what} row')} whose text is more than {self.most} tokens: "
                "shorten it with its recording, or raise max_length if that is less than what the model has"
            )
        return lines


def examples(rows: Sequence[Row], labels: Labels, *, max_length: int, positions: int, varied: bool) -> Examples:
    """What of these rows can be trained on or measured.

    Args:
        rows: in normal form.
        max_length: the configuration's: a text of more tokens is left out.
        positions: how many tokens the model's decoder has places for.
        varied: whether they are augmented.

    Raises:
        DataError: a row has no text that can be written, segments beyond its recording's end, or, unless they are
            skipped, a recording that cannot be used; with its number.
    """
    skip = labels.settings.on_bad_audio == "skip"
    found = Examples(most=min(max_length, positions))
    looks = looked_at(rows, whole=skip, most=labels.seconds + 1)
    for number, (row, look) in enumerate(zip(rows, looks, strict=True)):
        if look.fault is not None:
            if not skip:
                raise DataError(f"row {number + 1}: {look.fault} (stt.on_bad_audio: skip leaves such rows out)")
            found.bad[number] = f"row {number + 1}: {look.fault}"
            continue
        try:
            ids = labels(row)
        except DataError as error:
            raise DataError(f"row {number + 1}: {error}") from error
        if look.seconds > labels.seconds + SLACK:
            found.too_long += 1
        elif len(ids) > found.most:
            found.overlong += 1
        else:
            timed = labels.settings.timestamps and bool(row.get("segments"))
            if timed and (last := float(row["segments"][-1]["end"])) > look.seconds + ROUNDED:
                raise DataError(
                    f"row {number + 1}: segments[{len(row['segments']) - 1}] ends at {last:g} s, and its recording at "
                    f"{look.seconds:.2f} s: mend the times, or give the recording that they are of"
                )
            found.seconds += look.seconds
            found.numbers.append(number)
            found.rows.append(
                {
                    "audio": row["audio"],
                    "start": float(row.get("start") or 0.0),
                    "end": None if row.get("end") is None else float(row["end"]),
                    "labels": ids,
                    "varied": varied,
                    "timed": timed,
                }
            )
    return found


def dataset(job: Job, rows: Sequence[Row], name: str) -> Any:
    """Training rows; see :attr:`ft_core.plugins.ModalitySpec.dataset`.

    Returns:
        a ``datasets.Dataset``, with the columns that :class:`ft_speech.whisper.collating.WhisperCollator` takes.

    Raises:
        DataError: as :func:`examples`; or no row is left.
    """
    import datasets

    settings, what = settings_of(job.config), name.replace("_", "-")
    labels = labels_of(job.model, job.processor, settings, job.config.model)
    varied = name == "train"
    positions = int(job.model.config.max_target_positions)
    found = examples(rows, labels, max_length=job.config.max_length, positions=positions, varied=varied)
    job.kept[LEFT_OUT] = {**job.kept.get(LEFT_OUT, {}), name: list(found.bad)}
    for line in found.left_out(what, labels.seconds):
        job.say(line)
    job.kept[SAID] = name == "held_out"
    if not found.rows:
        raise DataError(f"none of {counted(len(rows), f'{what} row')} can be trained on")
    if name == "train" and settings.timestamps and not any(row["timed"] for row in found.rows):
        raise DataError("stt.timestamps is set, and no training row has segments: give them, or leave it out")
    job.counts |= {f"{name}_tokens": found.tokens}
    if name == "train":
        job.counts |= {
            "trained_tokens": found.tokens,
            "overlong_rows": found.too_long + found.overlong,
            "bad_audio_rows": len(found.bad),
            "audio_seconds": round(found.seconds),
        }
        job.say(f"{counted(len(found.rows), 'recording')}, {_duration(found.seconds)} of speech")
    columns = datasets.Features(
        {
            "audio": datasets.Value("large_string"),
            "start": datasets.Value("float64"),
            "end": datasets.Value("float64"),
            "labels": datasets.List(datasets.Value("int32")),
            "varied": datasets.Value("bool"),
            "timed": datasets.Value("bool"),
        }
    )
    return datasets.Dataset.from_list(found.rows, features=columns)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
