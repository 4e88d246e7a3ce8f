"""Variants of a configuration, and the largest of a row of them that fits."""

from __future__ import annotations

from collections.abc import Callable

from ft_core.config import TrainConfig

__all__ = ["most", "with_length", "with_rows"]


def most(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number from 1 to ``bound`` that fits, where every smaller one does too; 0 if none."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= bound and fits(high):
        low, high = high, 2 * high
    high = min(high, bound + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_rows(config: TrainConfig, rows: int) -> TrainConfig:
    """With another micro-batch, and as many rows to an update as before, if that goes up."""
    training = config.training
    before = training.batch_size * training.gradient_accumulation
    changed = {"batch_size": rows, "gradient_accumulation": max(-(-before // rows), 1)}
    return config.model_copy(update={"training": training.model_copy(update=changed)})


def with_length(config: TrainConfig, length: int) -> TrainConfig:
    """With another ``max_length``."""
    return config.model_copy(update={"max_length": length})
