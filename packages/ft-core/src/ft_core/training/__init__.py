"""Training: one call from a configuration to a run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_core.training.job import Job
    from ft_core.training.optimizers import queued
    from ft_core.training.run import TrainResult, train

__all__ = ["Job", "TrainResult", "queued", "train"]


def __getattr__(name: str) -> Any:
    # transformers and torch take seconds to import, so they wait until something is trained.
    if name == "Job":
        from ft_core.training.job import Job

        return Job
    if name == "queued":
        from ft_core.training.optimizers import queued

        return queued
    if name in ("TrainResult", "train"):
        from ft_core.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
