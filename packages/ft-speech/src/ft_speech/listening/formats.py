"""Transcripts as text, JSON, and subtitles."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ft_speech.listening.transcripts import Segment, Transcript

__all__ = ["FORMATS", "as_row", "clock", "cues", "document", "srt", "text", "vtt"]

FORMATS = ("txt", "json", "jsonl", "srt", "vtt")
"""What a transcript is written as; the ending of a file that holds it."""


def as_row(audio: str, seconds: float, task: str, transcript: Transcript) -> dict[str, Any]:
    """A transcript as an object of JSON; also a row that `task: stt` trains on.

    Args:
        audio: the file. seconds: its length. task: what was asked for.
    """
    row: dict[str, Any] = {"audio": audio, "seconds": round(seconds, 3), "language": transcript.language, "task": task}
    row["text"] = transcript.text
    if transcript.segments:
        row["segments"] = [_object(one) for one in transcript.segments]
    if transcript.cut:
        row["cut"] = transcript.cut
    return row


def _object(segment: Segment) -> dict[str, Any]:
    found: dict[str, Any] = {"start": round(segment.start, 3), "end": round(segment.end, 3), "text": segment.text}
    if segment.words:
        found["words"] = [
            {"start": round(word.start, 3), "end": round(word.end, 3), "text": word.text} for word in segment.words
        ]
    return found


def cues(transcript: Transcript) -> Iterable[tuple[float, float, str]]:
    """What is shown when: its segments, or their words where they have some."""
    for segment in transcript.segments:
        if segment.words:
            yield from ((word.start, word.end, word.text) for word in segment.words)
        else:
            yield segment.start, segment.end, segment.text


def text(transcript: Transcript, *, timed: bool) -> str:
    """Lines of text, ended each: all in one, or a line for each cue with its time."""
    if not timed:
        return f"{transcript.text}\n"
    return "".join(f"[{clock(start)} --> {clock(end)}] {said}\n" for start, end, said in cues(transcript))


def srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    blocks = [
        f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{said}\n"
        for number, (start, end, said) in enumerate(cues(transcript), 1)
    ]
    return "\n".join(blocks)


def vtt(transcript: Transcript) -> str:
    """WebVTT subtitles: https://www.w3.org/TR/webvtt1/, in whose text &, < and > are written out."""
    blocks = ["WEBVTT\n"]
    for start, end, said in cues(transcript):
        escaped = said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{clock(start)} --> {clock(end)}\n{escaped}\n")
    return "\n".join(blocks)


def clock(seconds: float, point: str = ".") -> str:
    """A time as ``HH:MM:SS.mmm``."""
    thousandths = round(seconds * 1000)
    whole, rest = divmod(thousandths, 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{rest:03}"


def document(format: str, rows: list[dict[str, Any]]) -> str:
    """Rows as the text of a ``.json`` or ``.jsonl`` file; a single row of JSON stands by itself."""
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return json.dumps(rows[0] if len(rows) == 1 else rows, ensure_ascii=False, indent=1) + "\n"
