"""Running out of memory while training, said in one line with the keys that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ft_core.config import TrainConfig
from ft_core.errors import RunError
from ft_core.memory import is_memory_error
from ft_core.runs import Run
from ft_core.training.trainer import last_whole_checkpoint

__all__ = ["memory_errors_said"]


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
