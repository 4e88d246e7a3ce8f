"""What a method's micro-batch is to the memory, beside a row and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from ft_core.config import TrainConfig
from ft_core.plugins import MethodSpec, registry, resolve

__all__ = ["ROW", "Load", "load_of"]


@dataclass(frozen=True)
class Load:
    """What a method computes of a micro-batch.

    Attributes:
        sequences: of up to ``max_length`` tokens, for each row of ``training.batch_size``: two for a pair.
        reference: whether a pass without gradients comes while the activations of the one with them wait.
        adapters: how many are trained, one after the other, each with gradients and an optimizer's state of its own.
        written: completions that are written at a time, each with its prompt up to ``max_length`` tokens long; the
            keys and values of all of them are kept meanwhile.
    """

    sequences: int = 1
    reference: bool = False
    adapters: int = 1
    written: int = 0


ROW = Load()
"""A row and its gradient, nothing else."""


def load_of(config: TrainConfig) -> Load:
    """The load of a configuration's method."""
    spec = registry().get(MethodSpec, config.method)
    if spec.load is None:
        return ROW
    found: Load = resolve(spec.load)(config)
    return found
