from __future__ import annotations

import json
import re

import pytest

from ft_speech.listening.formats import as_row, clock, document, srt, text, vtt
from ft_speech.listening.transcripts import Segment, Transcript, Word, joined, ordered

WORDS = (Word(0.0, 0.5, "Tom"), Word(0.5, 1.0, "& <Co>"))
SAID = Transcript("Tom & <Co> left.", "en", (Segment(0.0, 1.0, "Tom & <Co>", WORDS), Segment(3661.0456, 3662, "left.")))
PLAIN = Transcript("Tom & <Co> left.", "en", (Segment(0.0, 1.0, "Tom & <Co>"), Segment(3661.0456, 3662, "left.")))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "00:00:00.000"), (59.9996, "00:01:00.000"), (3599.9999, "01:00:00.000"), (360_000.5, "100:00:00.500")],
)
def test_times_carry_when_they_are_rounded(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_srt() -> None:
    assert srt(PLAIN) == ("1\n00:00:00,000 --> 00:00:01,000\nTom & <Co>\n\n2\n01:01:01,046 --> 01:01:02,000\nleft.\n")
    assert re.findall(r"^\d+$", srt(SAID), re.MULTILINE) == ["1", "2", "3"]  # a cue a word where there are words
    assert srt(Transcript("")) == ""


def test_vtt_writes_out_what_would_be_markup() -> None:
    assert vtt(PLAIN) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nTom &amp; &lt;Co&gt;\n\n01:01:01.046 --> 01:01:02.000\nleft.\n"
    )


def test_text() -> None:
    assert text(PLAIN, timed=False) == "Tom & <Co> left.\n"
    assert text(PLAIN, timed=True).splitlines()[1] == "[01:01:01.046 --> 01:01:02.000] left."


def test_json() -> None:
    row = as_row("/a.wav", 3663.00049, "transcribe", SAID)
    assert row == {
        "audio": "/a.wav", "seconds": 3663.0, "language": "en", "task": "transcribe", "text": "Tom & <Co> left.",
        "segments": [
            {"start": 0.0, "end": 1.0, "text": "Tom & <Co>", "words": [
                {"start": 0.0, "end": 0.5, "text": "Tom"}, {"start": 0.5, "end": 1.0, "text": "& <Co>"}]},
            {"start": 3661.046, "end": 3662, "text": "left."},
        ],
    }  # fmt: skip
    assert json.loads(document("json", [row])) == row
    assert json.loads(document("json", [row, row])) == [row, row]
    assert [json.loads(line) for line in document("jsonl", [row, row]).splitlines()] == [row, row]
    assert as_row("/a.wav", 1.0, "transcribe", Transcript("x", cut=2)) == {
        "audio": "/a.wav", "seconds": 1.0, "language": None, "task": "transcribe", "text": "x", "cut": 2,
    }  # fmt: skip


def test_windows_are_joined_with_the_times_of_the_recording() -> None:
    silent, first = Transcript(""), Transcript("one", "de", (Segment(0.5, 1.0, "one", (Word(0.5, 1.0, "one"),)),), 1)
    found = joined([(0.0, silent), (10.0, first), (20.0, first)])
    assert (found.text, found.language, found.cut) == ("one one", "de", 2)
    assert [(s.start, s.end, s.words[0].start) for s in found.segments] == [(10.5, 11, 10.5), (20.5, 21, 20.5)]
    assert joined([]) == Transcript("")


def test_times_go_forward_whatever_the_model_writes() -> None:
    wild = [
        Segment(0.0, 2.0, "a"), Segment(1.0, 1.5, "back"), Segment(3.0, 2.5, "turned", (Word(2.9, 2.0, "turned"),)),
        Segment(4.0, 9.0, "over", (Word(5.0, 4.5, "o"), Word(4.0, 8.0, "ver"))), Segment(6.0, 7.0, "in the padding"),
        Segment(4.5, 5.0, ""),
    ]  # fmt: skip
    found = ordered(wild, 6.0)
    assert [one.text for one in found] == ["a", "back", "turned", "over"]
    edges = [edge for one in found for edge in (one.start, one.end)]
    assert edges == [0.0, 2.0, 2.0, 2.0, 3.0, 3.0, 4.0, 6.0]
    assert [(word.start, word.end) for one in found for word in one.words] == [(3.0, 3.0), (5.0, 5.0), (5.0, 6.0)]


def test_texts_are_joined_as_their_languages_are_written() -> None:
    """Windows of Japanese without a space, other ones with one, and so a translation of Japanese."""
    ja = [Transcript("\u3053\u3093\u306b", "ja"), Transcript("", None), Transcript("\u3061\u306f", "ja")]
    parts = [(30.0 * number, one) for number, one in enumerate(ja)]
    assert joined(parts).text == "\u3053\u3093\u306b\u3061\u306f"
    assert joined([*parts, (90.0, Transcript("so it is", "en"))]).text == "\u3053\u3093\u306b\u3061\u306f so it is"
    assert joined([(0.0, Transcript("so", None)), (1.0, Transcript("it is", None))]).text == "so it is"
    english = [(0.0, Transcript("so", "ja")), (30.0, Transcript("it is", "ja"))]
    assert joined(english, "ja", translated=True).text == "so it is"
