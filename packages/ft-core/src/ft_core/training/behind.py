"""A step's loss and gradient norm are said one step later, so that nobody waits for the GPU between two steps.

Trainers of transformers read both from the GPU as soon as a step's work is launched, and only when it is done does the
host begin with the next step: meanwhile the GPU has nothing to do. Here they are copied beside the computation, and
read when the step after is launched, which keeps the host one step ahead at most. Rows, their numbers and their order
are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ft_core.models.device import peak_memory

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["LogsBehindMixin"]

MOMENT = ("global_step", "epoch", "num_input_tokens_seen")
"""What a trainer's state says of a step, beside the numbers that were logged before."""
DEVICES = ("cuda",)
"""Where the host launches work and goes on."""


@dataclass
class _Unsaid:
    """A finished step's numbers on their way to the host.

    Attributes:
        values: the loss, and the gradients' norm if there is one. ready: when they are there; None where they are.
        logs: what is known already. moment: the state's ``MOMENT``. launched: when all of it was launched.
        peak: bytes of memory at most until then.
    """

    values: Tensor
    ready: torch.cuda.Event | None
    logs: dict[str, float]
    start_time: float
    moment: dict[str, Any]
    launched: float
    peak: int


class _Clocks:
    """The GPU's clock beside the host's (``time.perf_counter``), read once when the GPU has nothing to do."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._event, self._time = torch.cuda.Event(enable_timing=True), time.perf_counter()
        self._event.record()

    def time_of(self, event: torch.cuda.Event) -> float:
        """When an event that is over was, by the host's clock."""
        return self._time + float(self._event.elapsed_time(event)) / 1e3


class LogsBehindMixin(_Base):
    """Puts the logging of a step behind the launch of the next (see :class:`RunTrainerMixin`).

    A step after which something is saved or measured, and the last one, are logged at once, after the one before.

    Attributes:
        logs_behind: whether it may; only for a trainer whose own logs have nothing else that belongs to a step.
    """

    logs_behind: bool = False
    _unsaid: _Unsaid | None = None
    _clocks: _Clocks | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training; whatever ends it, what was not said yet is."""
        self._unsaid = None
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            with suppress(Exception):  # the one that ended it matters
                self._say_unsaid()
            raise

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Any,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: Any,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        self._say_unsaid()  # first: what a callback asks for then is for this step
        if self._may_wait():
            self._unsaid = self._take(tr_loss, grad_norm, start_time, learning_rate)
        else:
            super()._maybe_log_save_evaluate(
                tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
            )

    def _may_wait(self) -> bool:
        control, state = self.control, self.state
        logged: int = self._globalstep_last_logged
        return (
            self.logs_behind
            and self.args.device.type in DEVICES
            and self.accelerator.num_processes == 1
            and control.should_log
            and state.global_step == logged + 1
            and state.global_step < state.max_steps
            and not (control.should_save or control.should_evaluate or control.should_training_stop)
            and not any(getattr(self, "_metrics", {}).get("train", {}).values())
        )

    def _take(self, tr_loss: Tensor, grad_norm: Any, start_time: float, learning_rate: float | None) -> _Unsaid:
        """Send the numbers to the host, and do what transformers does once it has them."""
        numbers = [tr_loss, *([grad_norm] if isinstance(grad_norm, Tensor) else [])]
        # A model that is spread over several devices has its norm on another one than the loss.
        values = torch.stack([x.detach().reshape(()).to(tr_loss.device, torch.double) for x in numbers])
        ready = None
        if values.is_cuda:
            if self._clocks is None:
                self._clocks = _Clocks()
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            ready = torch.cuda.Event(enable_timing=True)
            ready.record()
        tr_loss -= tr_loss
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        logs = {} if grad_norm is None or isinstance(grad_norm, Tensor) else {"grad_norm": float(grad_norm)}
        logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
        return _Unsaid(values, ready, logs, start_time, self._set_moment({}), time.perf_counter(), peak_memory())

    def _say_unsaid(self) -> None:
        """Log the step before as it would have been logged then."""
        unsaid, self._unsaid = self._unsaid, None
        if unsaid is None:
            return
        finished = unsaid.launched
        if unsaid.ready is not None and self._clocks is not None:
            unsaid.ready.synchronize()
            finished = self._clocks.time_of(unsaid.ready)
        loss, *norms = unsaid.values.tolist()
        self._total_loss_scalar += loss
        now, should_log = self._set_moment(unsaid.moment), self.control.should_log
        self.state.finished, self.state.peak = finished, unsaid.peak  # no part of what is saved
        try:
            with self._uncounted():
                self.log({"loss": loss, **({"grad_norm": norms[0]} if norms else {}), **unsaid.logs}, unsaid.start_time)
        finally:
            self._set_moment(now)
            del self.state.finished, self.state.peak
            self.control.should_log = should_log  # logging takes the wish for it back, which is the present step's

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Within it TRL has counted nothing: by now it may have begun to count for the step that is under way.

        A step whose own counts were there was not left unsaid (``_may_wait``).
        """
        counts = getattr(self, "_metrics", {}).get("train")
        if counts is None:
            yield
            return
        counted = dict(counts)
        counts.clear()
        try:
            yield
        finally:
            counts.clear()
            counts.update(counted)

    def _set_moment(self, values: dict[str, Any]) -> dict[str, Any]:
        """Put these into the trainer's state; what was there."""
        before = {name: getattr(self.state, name) for name in MOMENT}
        for name, value in values.items():
            setattr(self.state, name, value)
        return before
