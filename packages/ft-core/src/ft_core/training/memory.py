"""Running out of memory, said in one line with what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ft_core.config import TrainConfig
from ft_core.errors import RunError
from ft_core.runs import Run
from ft_core.training.trainer import last_whole_checkpoint

__all__ = ["is_memory_error", "memory_errors_said"]

WORDS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
"""torch has a class for a full GPU only; a full host, Apple's GPU and a library's own memory are told by the text."""


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that the GPU or the host has no memory left."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


@contextmanager
def memory_errors_said(run: Run, config: TrainConfig) -> Iterator[None]:
    """Turn a want of memory in the body into one line that names the keys to change.

    Raises:
        RunError: the body ran out of memory; checkpoints stay.
    """
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise RunError(_line(run, config)) from error


def _line(run: Run, config: TrainConfig) -> str:
    ways = []
    if config.activations != "recompute":
        ways.append("set activations: recompute")
    if config.lora is None:
        ways.append("train an adapter (lora) instead of the whole model")
    elif config.quantization != "nf4":
        ways.append("set quantization: nf4")
    if config.training.batch_size > 1:
        ways.append(f"lower training.batch_size (now {config.training.batch_size})")
    ways.append(f"lower max_length (now {config.max_length})")
    last = last_whole_checkpoint(run.checkpoints)
    # Of these only the recomputation leaves the losses as they were, so only with it may a run go on.
    kept = f"; {last.name} is whole, and --resume takes other activations" if last else ""
    return f"out of memory: {', or '.join(ways)}{kept}"
