"""What happens beside the optimizer steps: metrics are written, progress shown, an interruption saved."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ft_core.errors import RunError
from ft_core.models.device import peak_memory

__all__ = ["Interruption", "MetricsWriter", "Progress"]

DROPPED = ("num_input_tokens_seen", "epoch", "step", "num_tokens", "total_flos", "train_loss", "train_runtime")


class MetricsWriter(TrainerCallback):
    """Appends each step's numbers to ``metrics.jsonl``, and stops a run whose loss is no longer a number.

    Args:
        path: the file; None writes none (a process beside the main one).
        seconds: how long the run has taken already, where it is resumed.
        on_row: called with each row written.
    """

    def __init__(
        self, path: Path | None, seconds: float = 0.0, on_row: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._before = seconds
        self._on_row = on_row
        self._start = self._last = time.perf_counter()
        self._tokens = 0
        self._file: TextIO | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = self._last = time.perf_counter()
        self._tokens = int(state.num_input_tokens_seen)
        if self.path:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  # closed when training ends

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file:
            file.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            row = self._train_row(state, logs)
        elif "eval_loss" in logs:
            row = {"kind": "eval", "step": state.global_step}
            row |= {key.removeprefix("eval_"): v for key, v in logs.items() if key.startswith("eval_") and _number(v)}
            self._last = time.perf_counter()
        else:
            return
        self.rows.append(row)
        if self._file:
            try:
                self._file.write(json.dumps({k: _json(v) for k, v in row.items()}) + "\n")
                self._file.flush()
            except OSError as error:
                with suppress(OSError):  # closing tries to write what could not be written
                    self.close()
                raise RunError(
                    f"cannot write {self.path}: {error.strerror}; free some space, go on with --resume"
                ) from error
        if self._on_row:
            self._on_row(row)
        bad = next((key for key in ("loss", "grad_norm") if not _finite(row.get(key, 0.0))), None)
        # Under float16 an infinite gradient is the loss scaler's ordinary business: it skips the step.
        if bad and row["kind"] == "train" and not (bad == "grad_norm" and args.fp16):
            raise RunError(
                f"{bad.replace('_', ' ')} is {row[bad]} at step {state.global_step}: lower training.learning_rate or "
                "check the data; checkpoints up to the step before are whole"
            )

    def _train_row(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        # A step that is logged later than it ended says when that was, and what it took (ft_core.training.behind).
        now = getattr(state, "finished", None) or time.perf_counter()
        tokens = int(state.num_input_tokens_seen)
        row: dict[str, Any] = {
            "kind": "train",
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens) / max(now - self._last, 1e-9),
            "memory": getattr(state, "peak", None) or peak_memory(),
            "seconds": self._before + now - self._start,
        }
        others = {k: v for k, v in logs.items() if k not in row and k not in DROPPED and _number(v)}
        self._last, self._tokens = now, tokens
        return row | {k: v for k, v in others.items() if not k.startswith("train_")}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _json(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return value if _finite(value) else None


class Progress(TrainerCallback):
    """Shows how far the run is, its rate, its end and its memory: a live line on a terminal, else a line now and then.

    Args:
        writer: the metrics, of which the newest row is shown.
        stream: where to; None is stderr.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, writer: MetricsWriter, stream: TextIO | None = None, every: float = 10.0) -> None:
        self._writer = writer
        self._stream = stream or sys.stderr
        self._every = every
        self._shown = 0.0
        self._start = 0.0
        self._first = 0
        self._step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic()
        self._first = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        rows = self._writer.rows
        is_last = state.global_step >= state.max_steps
        live = self._stream.isatty()
        is_new = bool(rows) and rows[-1]["kind"] == "train" and rows[-1]["step"] != self._step
        if not is_new or not (live or is_last or now - self._shown >= self._every):
            return
        self._shown, self._step = now, state.global_step
        done = state.global_step - self._first
        left = (state.max_steps - state.global_step) * (now - self._start) / max(done, 1)
        row = rows[-1]
        line = (
            f"step {state.global_step}/{state.max_steps}  loss {row['loss']:.4f}  "
            f"{row['tokens_per_second']:.0f} tok/s  {row['memory'] / 2**30:.1f} GiB  {_clock(left)} left"
        )
        try:
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if is_last else "") if live else line + "\n")
            self._stream.flush()
        except OSError:
            pass  # a closed terminal is no reason to end a long run


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Interruption(TrainerCallback):
    """Ends a run at the next step, with a checkpoint, when asked to; :meth:`listen` lets Ctrl-C and SIGTERM ask."""

    def __init__(self, say: Callable[[str], None] = print, agree: Callable[[bool], bool] = bool) -> None:
        self.asked = False
        self._say = say
        self._agree = agree

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # All processes stop at the same step, though the signal may have reached them at different ones.
        self.asked = self._agree(self.asked)
        if self.asked:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listen(self) -> Iterator[None]:
        """The first signal asks for a checkpoint and an end; the second ends at once, as without us."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            self._say("stopping after this step, with a checkpoint (once more to stop at once)")

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
