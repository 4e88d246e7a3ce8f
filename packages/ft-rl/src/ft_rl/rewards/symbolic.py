"""The reward ``math``: whether the answer's formula equals the row's, by math-verify."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ft_core.errors import ConfigError
from ft_rl.rewards.exact import Gold
from ft_rl.rewards.extraction import extract
from ft_rl.rewards.samples import Text, column_of, score_each, text_of

__all__ = ["Comparer", "MathSettings", "math_reward"]

MEMORY = 2 * 2**30
"""Bytes of address space that the comparing process may take."""

START = 120.0
"""Seconds that it may take to start."""


class MathSettings(Gold):
    """Settings of ``math``; those of :class:`ft_rl.rewards.exact.Gold` too.

    Attributes:
        seconds: how long one comparison may take; one that takes longer has found no equality.
    """

    seconds: float = Field(default=5.0, gt=0, le=600, allow_inf_nan=False)


class Comparer:
    """Compares formulas in a process of its own, which is killed and started anew when one takes too long.

    sympy can take any time and memory on a few characters, and math-verify's own limit works in the main thread only.
    May be called from several threads; they take turns.

    Args:
        seconds: how long one comparison may take.

    Attributes:
        timeouts: how many took longer so far.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.timeouts = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None  # it ends when nobody is left to write to it

    def __del__(self) -> None:
        self.close()

    def equal(self, gold: Sequence[str], answer: str) -> bool:
        """Whether a formula equals one of the right ones; False where that takes too long to find out.

        Raises:
            ValueError: none of the right ones can be read.
            ConfigError: the process doesn't start.
        """
        job = json.dumps({"gold": list(gold), "answer": answer, "seconds": self.seconds})
        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            line = _ask(process, job, self.seconds)
            if not line:
                self.close()
                self.timeouts += 1
                return False
        said = json.loads(line)
        if "unread" in said:
            raise ValueError(f"the right answer {said['unread'][:60]!r} is no formula that math-verify can read")
        return bool(said["equal"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        worker = Path(__file__).with_name("math_worker.py")
        self._process = process = subprocess.Popen(
            [sys.executable, "-I", str(worker), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if _ask(process, None, START).strip() != "ready":
            self.close()
            raise ConfigError("the process that compares formulas does not start: does `import math_verify` work here?")
        return process


def _ask(process: subprocess.Popen[str], line: str | None, seconds: float) -> str:
    """A line's answer; nothing where the process ends first, or is killed since its time is up."""
    assert process.stdin is not None
    assert process.stdout is not None
    alarm = threading.Timer(seconds, process.kill)
    alarm.daemon = True
    alarm.start()
    try:
        if line is not None:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""
    finally:
        alarm.cancel()


def math_reward(settings: MathSettings) -> Any:
    """The reward function: 1.0 where the completion's answer equals one of the row's as a formula, 0.0 elsewhere.

    Raises:
        ConfigError: math-verify isn't installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError('math-verify is not installed: pip install "ft-rl[math]"')
    comparer = Comparer(settings.seconds)

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        golds = column_of(columns, *settings.names)

        def score(i: int) -> float:
            accepted = settings.accepted(golds[i])
            answer = extract(text_of(completions[i]), settings)
            return float(bool(answer) and comparer.equal(accepted, str(answer)))

        before = comparer.timeouts
        try:
            return score_each(len(completions), score)
        finally:
            log_metric = columns.get("log_metric")
            if callable(log_metric):
                log_metric("rewards/math/timeouts", comparer.timeouts - before)

    reward.columns = settings.needed  # type: ignore[attr-defined]
    reward.comparer = comparer  # type: ignore[attr-defined]
    return reward
