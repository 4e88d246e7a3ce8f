"""What stands before a language model: what a modality's inputs become tokens by, as far as memory and time go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError
from ft_core.models.source import ModelSource
from ft_core.plugins import ModalitySpec, registry, resolve

__all__ = ["Front", "Fronts", "fronts_of", "stands_in"]


@dataclass(frozen=True)
class Front:
    """What a model computes before its first layer, as a configuration trains it. Sizes are of one such token, a piece
    of an image.

    Attributes:
        frozen: modules that have no adapter and are not trained, by their paths.
        whole: modules that are trained whole, beside an adapter if there is one.
        share: of a row's tokens, how many are such pieces.
        inputs: bytes of the batch. kept: bytes from forward to backward. kept_again: the same where its layers are
            computed again. features: bytes of what it gives.
        work: bytes while it is computed alone, forward or backward. layer: bytes that one of its layers keeps.
        recomputed: whether its layers are computed again.
        flops: operations of the forward pass. passes: of all its passes, in forward passes.
        copies: bytes of 16-bit copies of its weights, where those are in 32 and trained.
        itemsize: bytes of a number of ``whole``, and of its gradient, beside an adapter.
        row_tokens: the mean tokens of a row of the data, where they were counted.
        notes: what is assumed, a line each.
    """

    frozen: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    share: float = 1.0
    inputs: float = 0.0
    kept: float = 0.0
    kept_again: float = 0.0
    features: float = 0.0
    work: float = 0.0
    layer: float = 0.0
    recomputed: bool = False
    flops: float = 0.0
    passes: float = 1.0
    copies: int = 0
    itemsize: int = 4
    row_tokens: float | None = None
    notes: tuple[str, ...] = ()

    def again(self) -> Front:
        """The same, its layers computed again in backward."""
        return replace(
            self, kept=self.kept_again, work=self.work + self.layer, passes=self.passes + 1, recomputed=True
        )  # fmt: skip


class Fronts(Protocol):
    """What stands before the layers of one model, by configuration; see :attr:`ft_core.plugins.ModalitySpec.plan`.

    Attributes:
        auto: transformers' auto class that knows the model. modules: that are no part of its language model, by their
            paths.
    """

    auto: Any
    modules: tuple[str, ...]

    def __call__(self, config: TrainConfig) -> Front:
        """As this configuration trains it.

        Raises:
            FtError: it cannot.
        """
        ...


def fronts_of(config: TrainConfig, source: ModelSource) -> Fronts | None:
    """Of a configuration's model; None for a model of text.

    Raises:
        ModelError: the model is none of the configuration's modality.
        ConfigError: the modality cannot be planned.
    """
    reference = registry().get(ModalitySpec, config.task).plan
    if reference is None:
        if config.task != "text":
            raise ConfigError(f"task: ft plan does not know the task {config.task!r} yet")
        return None
    found: Fronts = resolve(reference)(config, source)
    return found


def stands_in(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a module or parameter is one of these modules, or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
