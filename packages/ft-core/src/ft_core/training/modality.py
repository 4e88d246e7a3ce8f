"""What a modality puts in the place of text's."""

from __future__ import annotations

from typing import Any

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError
from ft_core.plugins import MethodSpec, ModalitySpec, registry, resolve

__all__ = ["check_text_only", "measure_of", "of_modality"]


def of_modality(config: TrainConfig, part: str) -> Any:
    """The function that the modality of ``task`` names for a part of the training, or None where it is text's.

    Args:
        part: the name of an attribute of :class:`ft_core.plugins.ModalitySpec` that holds a reference.
    """
    reference = getattr(registry().get(ModalitySpec, config.task), part)
    return None if reference is None else resolve(reference)


def measure_of(config: TrainConfig, spec: MethodSpec) -> Any:
    """What measures a model of ``config``: the modality's own function, or the method's."""
    own = None if spec.inputs else of_modality(config, "evaluate")
    return own or resolve(spec.evaluate)


def check_text_only(config: TrainConfig, command: str) -> None:
    """Refuse a configuration of another modality in a command that reads text alone.

    Raises:
        ConfigError: it is of one.
    """
    if config.task != "text":
        raise ConfigError(f"task: {command} does not know the task {config.task!r} yet (allowed: text)")
