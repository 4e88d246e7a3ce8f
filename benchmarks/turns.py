"""Processes that get ready side by side, and then take turns: nothing else runs while one of them is timed.

A process prints the line READY once it is ready and waits for a line on its standard input (:func:`my_turn`). Its turn
ends with the process, whose memory the next ones may have.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

__all__ = ["READY", "Player", "my_turn", "play"]

READY = "--ready--"


def my_turn() -> None:
    """Say that this process is ready and wait for its turn; leave if whoever gives turns has left."""
    print(READY, flush=True)
    if not sys.stdin.readline():
        raise SystemExit(1)


class Player:
    """One process.

    Attributes:
        lines: what it has printed in its turn.
        error: why it failed, in one line; None where it did not.

    Args:
        heard: told each line at once.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], heard: Callable[[str], None] | None = None
    ) -> None:
        self.lines: list[str] = []
        self.error: str | None = None
        self._heard = heard
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=dict(environment),
            start_new_session=True,  # so that processes of its own can be ended with it
        )  # fmt: skip
        self._printed: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def get_ready(self, until: float) -> None:
        """Wait until it is ready, or has failed; at the time ``until`` (``time.monotonic``) it is ended."""
        for line in self._lines(until):
            if line == READY:
                return
        if self.error is None:
            self._failed()  # it has ended before its turn

    def turn(self, seconds: float) -> None:
        """Let it run to its end, or for so many seconds, after which it is ended."""
        if self.error is not None:
            return
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        self.lines += self._lines(time.monotonic() + seconds)
        if self.error is None and self._process.returncode:
            self._failed()

    def end(self) -> None:
        """End it and what it has started, wherever they are."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._printed.put(line.rstrip("\n"))
            if self._heard is not None:
                self._heard(line.rstrip("\n"))

    def _lines(self, until: float) -> list[str]:
        """What it prints until it is ready (READY is the last one then), or ends; ``error`` is set if it is late."""
        found: list[str] = []
        while True:
            ended = self._process.poll() is not None
            try:
                # A process of its own may keep the pipe open, so its end is looked for, not the pipe's.
                found.append(self._printed.get(timeout=0.2))
                if found[-1] == READY:
                    return found
                continue
            except queue.Empty:
                if ended:
                    self.end()
                    return found
            if time.monotonic() > until:
                self.error = "took too long and was ended"
                self.end()
                return found

    def _failed(self) -> None:
        self._log.seek(0)
        words = [line.strip() for line in self._log if line.strip()] or [f"exit code {self._process.returncode}"]
        self.error = words[-1][:300]


def play(
    starts: Sequence[Callable[[], Player]],
    done: Callable[[int, Player], None],
    *,
    together: bool,
    ready: float = 420.0,
    turn: float = 120.0,
) -> None:
    """Start processes, give each its turn in order, and hand each to ``done`` with its number after it.

    Args:
        together: start all at once, and give the first turn when all are ready; otherwise each starts for its turn.
        ready, turn: seconds that getting ready and a turn may take.
    """
    players: list[Player] = []
    try:
        groups = [starts] if together else [[start] for start in starts]
        for group in groups:
            began = [start() for start in group]
            players += began
            until = time.monotonic() + ready
            for player in began:
                player.get_ready(until)
            for player in began:
                player.turn(turn)
                done(players.index(player), player)
    finally:
        for player in players:
            player.end()
