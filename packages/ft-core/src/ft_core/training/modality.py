"""What a modality puts in the place of text's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.config import TrainConfig
from ft_core.data.formats import Format
from ft_core.errors import ConfigError, PluginError
from ft_core.plugins import MethodSpec, ModalitySpec, registry, resolve
from ft_core.training.optimizers import Rates, check_rates

if TYPE_CHECKING:
    from ft_core.models import ModelSource

__all__ = [
    "RowForm", "check_text_only", "is_of", "measure_of", "of_modality", "rates_of", "trainer_of", "with_local_task",
    "with_task",
]  # fmt: skip


class RowForm:
    """How a modality brings rows to their normal form, as :func:`ft_core.data.read_rows` takes it.

    Attributes:
        columns: gives a row's columns those of a format, before that is recognised; see ``ModalitySpec.columns``.
    """

    def __init__(
        self, rows: Callable[..., dict[str, Any]], columns: Callable[..., Mapping[str, Any]] | None, config: TrainConfig
    ) -> None:
        self.columns = columns
        takes_config = "config" in inspect.signature(rows).parameters
        self._rows = partial(rows, config=config) if takes_config else rows

    def __call__(self, row: Mapping[str, Any], format: Format, folder: Path | None) -> dict[str, Any]:
        return self._rows(row, format, folder)


def of_modality(config: TrainConfig, part: str) -> Any:
    """The function that the modality of ``task`` names for a part of the training, or None where it is text's.

    Args:
        part: the name of an attribute of :class:`ft_core.plugins.ModalitySpec` that holds a reference. For ``rows`` the
            result is a :class:`RowForm`, which knows the configuration.
    """
    spec = registry().get(ModalitySpec, config.task)
    reference = getattr(spec, part)
    if reference is None:
        return None
    if part == "rows":
        return RowForm(resolve(reference), None if spec.columns is None else resolve(spec.columns), config)
    return resolve(reference)


def rates_of(model: Any, config: TrainConfig) -> Rates:
    """The parts that have a learning rate of their own in this training, each with parameters that are trained.

    Raises:
        ConfigError: a part has none.
    """
    rates = of_modality(config, "rates")
    if rates is None:
        return {}
    found: Rates = rates(model, config)
    check_rates(model, found, config.task)
    return found


def measure_of(config: TrainConfig, spec: MethodSpec) -> Any:
    """What measures a model of ``config``: the modality's own function, or the method's."""
    own = None if spec.inputs else of_modality(config, "evaluate")
    return own or resolve(spec.evaluate)


def trainer_of(config: TrainConfig, spec: MethodSpec) -> Callable[[Any], Any]:
    """What builds the trainer of a job: the modality's own function where it takes the job's model, or the method's."""
    own, method = of_modality(config, "trainer"), resolve(spec.trainer)
    if own is None:
        return method  # type: ignore[no-any-return]

    def build(job: Any) -> Any:
        trainer = own(job)
        return method(job) if trainer is None else trainer

    return build


def with_task(config: TrainConfig, source: ModelSource) -> TrainConfig:
    """The configuration with the task that its model is of, where it names none.

    Raises:
        FtError: it holds what that task does not allow; see :func:`ft_core.config.load_config`.
    """
    from ft_core.config.load import check_config

    if "task" in config.model_fields_set:
        return config
    names = registry().names(ModalitySpec.group)
    task = next((name for name in names if is_of(name, source, claimed=True)), None)
    return config if task is None else check_config(config.model_copy(update={"task": task}))


def with_local_task(config: TrainConfig) -> TrainConfig:
    """:func:`with_task` where the model is a folder on this machine; of others nothing is known yet.

    Raises:
        FtError: as :func:`with_task`.
    """
    from ft_core.models.source import ModelSource

    local = Path(config.model).expanduser()
    return with_task(config, ModelSource(config.model, local, local.name)) if local.is_dir() else config


def is_of(name: str, source: ModelSource, *, claimed: bool = False) -> bool:
    """Whether the modality of this name says that a model is its own.

    Args:
        claimed: ask only those modalities that configurations without a task are theirs for such a model.
    """
    try:
        spec = registry().get(ModalitySpec, name)
        if spec.knows is None or (claimed and not spec.claims):
            return False
        return bool(resolve(spec.knows)(source))
    except (PluginError, ImportError):  # what is broken keeps no other model from being opened; `ft plugins` says it
        return False


def check_text_only(config: TrainConfig, command: str) -> None:
    """Refuse a configuration of another modality in a command that reads text alone.

    Raises:
        ConfigError: it is of one.
    """
    if config.task != "text":
        raise ConfigError(f"task: {command} does not know the task {config.task!r} yet (allowed: text)")
