"""The learning rate's rise: from above zero, so that the first step trains, which in a short run is all there is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

__all__ = ["renewed", "rising"]


def rising(scheduler: LRScheduler, warmup: int) -> LRScheduler:
    """A scheduler as transformers makes it, whose first of ``warmup`` steps has a rate too.

    transformers' rate at step k (from 0) is k/warmup of the peak: a step without one, and nothing is learnt where the
    run has no other. Here it is (k+1)/(warmup+1); after the warmup all is as it was. A schedule that has none, and one
    that is no ``LambdaLR`` (none of those that ft offers), is handed back as it is.
    """
    if warmup < 1 or not isinstance(scheduler, LambdaLR):
        return scheduler
    # Anew rather than changed: it is when a scheduler is made that the optimizer gets the first step's rate.
    return LambdaLR(scheduler.optimizer, [partial(_rate, plain, warmup) for plain in scheduler.lr_lambdas])


def renewed(scheduler: LRScheduler) -> LRScheduler:
    """A scheduler that was loaded from a checkpoint, with its own rate for the step to come.

    The rate that was saved is that of the run as it was then: nothing, where its last step was done, though it now goes
    on for longer. In a run of the same length both are the same number.
    """
    if not isinstance(scheduler, LambdaLR):
        return scheduler
    return LambdaLR(scheduler.optimizer, scheduler.lr_lambdas, last_epoch=scheduler.last_epoch - 1)


def _rate(plain: Callable[[Any], float], warmup: int, step: int) -> float:
    # Any schedule's rise is stretched by asking it for moments between its steps; the last of them is below warmup.
    return plain((step + 1) * warmup / (warmup + 1) if step < warmup else step)
