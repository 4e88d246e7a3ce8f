"""What a method's micro-batch is to the memory, beside a row and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

from ft_core.config import TrainConfig
from ft_core.plugins import MethodSpec, registry, resolve

__all__ = ["ROW", "Held", "Load", "load_of"]


@dataclass(frozen=True)
class Held:
    """What stays in memory beside the model that is trained: another model's weights, or an adapter.

    Attributes:
        part: what the plan calls it.
        model: a folder or Hub name, of whose ``config.json`` the weights are counted; None where there are none.
        head: what that model ends in, as of a method. quantization: of its weights. itemsize: bytes of a number that is
            not quantized.
        numbers: of an adapter and its head, 4 bytes each.
    """

    part: str
    model: str | None = None
    head: str = "language-model"
    quantization: str = "none"
    itemsize: int = 2
    numbers: int = 0


@dataclass(frozen=True)
class Load:
    """What a method computes of a micro-batch.

    Attributes:
        sequences: of up to ``max_length`` tokens, for each row of ``training.batch_size``: two for a pair.
        reference: whether a pass without gradients comes while the activations of the one with them wait.
        adapters: how many are trained, one after the other, each with gradients and an optimizer's state of its own.
        written: completions that are written at a time, each with its prompt up to ``max_length`` tokens long; the
            keys and values of all of them are kept meanwhile.
        held: what else stays in memory all the time.
    """

    sequences: int = 1
    reference: bool = False
    adapters: int = 1
    written: int = 0
    held: tuple[Held, ...] = ()


ROW = Load()
"""A row and its gradient, nothing else."""


def load_of(config: TrainConfig) -> Load:
    """The load of a configuration's method."""
    spec = registry().get(MethodSpec, config.method)
    if spec.load is None:
        return ROW
    found: Load = resolve(spec.load)(config)
    return found
