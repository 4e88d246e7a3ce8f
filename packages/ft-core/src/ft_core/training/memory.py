"""How much memory a training may take, and running out of it, said in one line with the keys that help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError, RunError
from ft_core.memory import StillOutOfMemory, bytes_of, is_memory_error
from ft_core.models import Device
from ft_core.runs import Run
from ft_core.training.trainer import last_whole_checkpoint

__all__ = ["InUse", "memory_capped", "memory_errors_said"]

STATELESS = ("adafactor", "sgd")
"""Optimizers of which next to nothing lies on the GPU between updates."""


@contextmanager
def memory_capped(config: TrainConfig, device: Device, say: Callable[[str], None]) -> Iterator[None]:
    """Within it torch takes no more of the GPU's memory than ``memory`` says; what CUDA itself takes is beside that.

    Raises:
        ConfigError: it says more than the GPU has.
    """
    if config.memory == "auto":
        yield
        return
    if device.type != "cuda":
        say(f"memory: {config.memory} is for a GPU's memory, and this runs on none: nothing is limited")
        yield
        return
    import torch

    cap = bytes_of(config.memory)
    if cap > device.memory:
        raise ConfigError(
            f"memory: {config.memory!r} is more than the GPU has (allowed: auto, or up to "
            f"{device.memory / 2**30:.1f}GiB)"
        )
    index = torch.cuda.current_device()
    torch.cuda.set_per_process_memory_fraction(cap / device.memory, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


@dataclass
class InUse:
    """What a plan has chosen in place of what the configuration says.

    Attributes:
        optimizer: by transformers' name.
    """

    optimizer: str


@contextmanager
def memory_errors_said(run: Run, config: TrainConfig) -> Iterator[InUse]:
    """Turn a want of memory in the body into one line that names the keys to change.

    Yields:
        What the configuration says is in use; the body puts there what is.

    Raises:
        RunError: the body ran out of memory; checkpoints stay.
    """
    used = InUse(config.training.optimizer)
    try:
        yield used
    except Exception as error:
        if not is_memory_error(error):
            raise
        tried = str(error) if isinstance(error, StillOutOfMemory) else None
        raise RunError(_line(run, config, used, tried)) from error


def _line(run: Run, config: TrainConfig, used: InUse, tried: str | None = None) -> str:
    ways = []
    if config.memory != "auto":
        ways.append(f"raise memory (now {config.memory})")
    if tried is None and config.activations not in ("recompute", "offload"):
        ways.append("set activations: recompute")
    if config.lora is None:
        ways.append("train an adapter (lora) instead of the whole model")
        if not used.optimizer.startswith("paged") and used.optimizer not in STATELESS:
            ways.append("set training.optimizer: paged_adamw_8bit")
    elif config.quantization != "nf4":
        ways.append("set quantization: nf4")
    if config.training.batch_size > 1:
        ways.append(f"lower training.batch_size (now {config.training.batch_size})")
    ways.append(f"lower max_length (now {config.max_length})")
    last = last_whole_checkpoint(run.checkpoints)
    # Of these only the recomputation leaves the losses as they were, so only with it may a run go on.
    kept = f"; {last.name} is whole, and --resume takes other activations" if last else ""
    again = "" if tried is None else f" again, after planning anew ({tried})"
    return f"out of memory{again}: {', or '.join(ways)}{kept}"
