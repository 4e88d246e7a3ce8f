"""How far the writing down of recordings is: files, seconds of audio, how fast, and how long it will take."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

__all__ = ["Shown", "seconds_of"]

CLEARED = "\r\x1b[K"
"""Takes a terminal's cursor to the beginning of the line, which is emptied."""


def seconds_of(path: str | os.PathLike[str]) -> float:
    """How long a recording is as its header says; 0 for what has none, or cannot be read."""
    import soundfile

    try:
        if not Path(path).is_file():
            return 0.0
        info = soundfile.info(os.fspath(path))
        return max(float(info.frames) / info.samplerate, 0.0) if info.samplerate > 0 else 0.0
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OSError):
        return 0.0


class Shown:
    """A line on stderr that says how far the work is: at a terminal in place, elsewhere a new one now and then.

    Args:
        files: how many there are. seconds: of audio, in all.
    """

    def __init__(self, files: int, seconds: float) -> None:
        self._files, self._seconds = files, seconds
        self._done, self._heard = 0, 0.0
        self._start, self._said = time.monotonic(), 0.0
        self._live = sys.stderr.isatty()
        self._open = False

    def heard(self, seconds: float) -> None:
        """So much more audio was heard."""
        self._heard += seconds
        self._show()

    def files(self, count: int) -> None:
        """So many more files are done with."""
        self._done += count
        self._show()

    def lost(self, seconds: float) -> None:
        """A file of this length cannot be used."""
        self._seconds -= seconds
        self._done += 1

    def corrected(self, seconds: float) -> None:
        """A file turned out to be so much longer than its header said."""
        self._seconds += seconds

    def clear(self) -> None:
        """Make room for a line of another kind."""
        if self._open:
            sys.stderr.write(CLEARED)
            sys.stderr.flush()
            self._open = False

    def end(self) -> None:
        """The last line, with the whole."""
        if self._heard > 0:
            self._say(last=True)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._said >= (0.2 if self._live else 10.0) and self._heard > 0:
            self._said = now
            self._say(last=False)

    def _say(self, *, last: bool) -> None:
        passed = max(time.monotonic() - self._start, 1e-9)
        rate = self._heard / passed
        left = max(self._seconds - self._heard, 0.0) / rate
        line = (
            f"{self._done}/{self._files} files  {self._heard:.0f}/{max(self._seconds, self._heard):.0f} s of audio  "
            f"{rate:.1f} s/s  {f'{passed:.0f} s' if last else f'{left:.0f} s left'}"
        )
        begun, ended = CLEARED if self._live else "", "" if self._live and not last else "\n"
        sys.stderr.write(f"{begun}{line}{ended}")
        sys.stderr.flush()
        self._open = self._live and not last
