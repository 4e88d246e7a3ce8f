"""A reward as the trainer calls it: what it returns is checked, what goes wrong is named and handled as configured."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from ft_core.errors import DataError, FtError, RunError
from ft_rl.rewards.samples import SampleErrors, Text, start_of

__all__ = ["OnError", "Reward"]

OnError = Literal["stop", "skip", "zero"]

SHOWN = 3
"""So many faults of a reward are told each in full; after them their number, whenever it has doubled."""

LOGGERS = ("log_extra", "log_metric")
"""What TRL hands a reward function to log with."""


@dataclass(frozen=True)
class _Fault:
    said: str


class Reward:
    """One reward function with a name, a weight, and a way with faults.

    Called as TRL calls a reward function, it returns a finite float per sample, or None for one that isn't scored: what
    the function itself returned None for, or where it failed and ``on_error`` is ``skip``. A fault is a sample on which
    the function raises, or for which it returns something that is no finite number. A function that raises on a batch
    is called again with one sample at a time, to tell the samples on which it raises; one that returns another number
    of values than there are samples has failed on all of them. An :class:`ft_core.errors.FtError` is no fault of a
    sample but a mistake of the configuration's or the data's, and always raised.

    Args:
        function: ``f(prompts, completions, **columns)``, a coroutine function too.
        name: what it is called in logs and messages; becomes ``__name__``, which TRL reads.
        weight: what the trainer multiplies its values by.
        on_error: ``stop`` (raise), ``skip`` (None) or ``zero`` (0.0).
        settings: further keyword arguments at each call.
        say: prints one line.

    Attributes:
        columns: the columns of the data that the function has said it needs.
        samples: how many samples it was called with so far.
        faults: how many of them were faults.

    Raises:
        RunError: at a call, a fault with ``on_error`` ``stop``; names the reward and the sample.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        weight: float = 1.0,
        on_error: OnError = "stop",
        settings: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.function = function
        self.name = self.__name__ = name
        self.weight = weight
        self.on_error = on_error
        self.settings = dict(settings or {})
        self.columns: tuple[str, ...] = tuple(getattr(function, "columns", ()))
        self.samples = 0
        self.faults = 0
        self._say = say
        self._say_at = SHOWN + 1
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - the method itself is asked for, not whether it is there
        )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        both = sorted(self.settings.keys() & columns.keys())
        if both:
            raise DataError(
                f"reward {self.name!r}: {both[0]!r} is a setting of it and a column of the data: rename one"
            )
        outcomes = self._outcomes(prompts, completions, columns)
        self.samples += len(prompts)
        failed = {i: outcome.said for i, outcome in enumerate(outcomes) if isinstance(outcome, _Fault)}
        if failed:
            self._tell(failed, prompts)
        log_metric = columns.get("log_metric")
        if callable(log_metric) and self.on_error != "stop" and outcomes:
            log_metric(f"rewards/{self.name}/faults", len(failed) / len(outcomes))
        instead = None if self.on_error == "skip" else 0.0
        return [instead if isinstance(outcome, _Fault) else outcome for outcome in outcomes]

    def _tell(self, failed: Mapping[int, str], prompts: Sequence[Text]) -> None:
        before, self.faults = self.faults, self.faults + len(failed)
        lines = [
            f"reward {self.name!r}: sample {i + 1} of {len(prompts)} (prompt {start_of(prompts[i])!r}): {said}"
            for i, said in failed.items()
        ]
        if self.on_error == "stop":
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RunError(f"{lines[0]}{more}; on_error: skip or zero would go on")
        done = "skipped" if self.on_error == "skip" else "counted as 0"
        for line in lines[: max(SHOWN - before, 0)]:
            self._say(f"{line}; {done}")
        if self.faults >= self._say_at:
            self._say(
                f"reward {self.name!r}: {self.faults:,} of {self.samples:,} samples so far failed and were {done}"
            )
            while self._say_at <= self.faults:
                self._say_at *= 2

    def _outcomes(
        self, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]
    ) -> list[float | _Fault | None]:
        count = len(prompts)
        try:
            values = self._called(prompts, completions, columns)
        except FtError as error:
            raise type(error)(f"reward {self.name!r}: {error}") from error
        except SampleErrors as error:
            return [
                _Fault(error.errors[i]) if i in error.errors else _checked(value)
                for i, value in enumerate(error.values)
            ]
        except (Exception, SystemExit) as error:  # the user's code raises what it likes
            fault = _Fault(f"raises {_where(error)}")
            if count <= 1:
                return [fault] * count
            singly = [self._outcomes([prompts[i]], [completions[i]], _only(columns, i, count))[0] for i in range(count)]
            if any(isinstance(outcome, _Fault) for outcome in singly):
                return singly
            return [_Fault(f"{fault.said}, on the whole batch but on no sample of it alone")] * count
        try:
            listed = list(values)
        except TypeError:
            return [_Fault(f"returns {_shown(values)}, no list of numbers")] * count
        if len(listed) != count:
            return [_Fault(f"returns {len(listed)} values for {count} samples")] * count
        return [_checked(value) for value in listed]

    def _called(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]) -> Any:
        arguments = {**columns, **self.settings}
        if not self._is_async:
            return self.function(prompts=prompts, completions=completions, **arguments)
        # In a thread of its own, since the caller's may have a running loop already.
        with ThreadPoolExecutor(1) as pool:
            made = self.function(prompts=prompts, completions=completions, **arguments)
            return pool.submit(asyncio.run, made).result()


def _only(columns: Mapping[str, Any], i: int, count: int) -> dict[str, Any]:
    """The arguments of one sample; a second call logs nothing a second time."""
    one = {n: [v[i]] if isinstance(v, list) and len(v) == count else v for n, v in columns.items()}
    return {name: _nothing if name in LOGGERS else value for name, value in one.items()}


def _nothing(*_: Any) -> None:
    pass


def _checked(value: Any) -> float | _Fault | None:
    if value is None:
        return None
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == ():  # an array's or a tensor's element
        value = value.item()
    if not isinstance(value, numbers.Real):
        return _Fault(f"returns {_shown(value)}, no number")
    number = float(value)
    return number if math.isfinite(number) else _Fault(f"returns {number}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:39] + '…'} ({type(value).__name__})"


def _where(error: BaseException) -> str:
    """The error with the innermost line of Python that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
