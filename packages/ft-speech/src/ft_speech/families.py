"""The families of models that listen and speak, and what of the modalities `stt` and `tts` each of them does.

A family is a module with the functions of :class:`Family`, chosen by the ``model_type`` of a model's configuration.
The functions here are those that :mod:`ft_speech.plugin` registers: each hands on to the family's own.
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any, Protocol, cast

from ft_core.errors import ModelError

if TYPE_CHECKING:
    from ft_core.config import TrainConfig
    from ft_core.models import Device, ModelSource

__all__ = [
    "FAMILIES", "Family", "adapter_options", "collator", "dataset", "evaluate", "family_of", "fast", "knows_stt",
    "knows_tts", "load_for_training", "load_processor", "model_type_of", "trainer", "verify",
]  # fmt: skip

FAMILIES: dict[str, dict[str, str]] = {
    "stt": {"whisper": "ft_speech.whisper.family", "qwen3_asr": "ft_speech.qwen_asr.family"},
    "tts": {"csm": "ft_speech.csm.family"},
}
"""The module of each family, by task and ``model_type``."""

ANY = {"tts": "ft_speech.orpheus.family"}
"""The module of models of no family of the task's own: language models that learn a codec's tokens."""


class Family(Protocol):
    """What a family's module has; all as the attribute of the same meaning of :class:`ft_core.plugins.ModalitySpec`."""

    def load_for_training(self, source: ModelSource, config: TrainConfig, device: Device, head: str) -> Any: ...

    def load_processor(self, source: ModelSource, config: TrainConfig, tokenizer: Any) -> Any: ...

    def adapter_options(self, model: Any, config: TrainConfig) -> dict[str, Any]: ...

    def dataset(self, job: Any, rows: Any, name: str) -> Any: ...

    def collator(self, job: Any) -> Any: ...

    def trainer(self, job: Any) -> Any: ...

    def evaluate(self, job: Any) -> Any: ...

    def fast(self, model: Any) -> Any: ...


def family_of(task: str, model_type: str, name: str) -> Family:
    """The module of a model's family.

    Args:
        name: what the configuration calls the model, for the message.

    Raises:
        ModelError: no family of the task's has such models.
    """
    others = {kind for known, kinds in FAMILIES.items() if known != task for kind in kinds}
    module = FAMILIES[task].get(model_type) or (None if model_type in others else ANY.get(task))
    if module is None:
        raise ModelError(
            f"the model {name} is a {model_type}, which task: {task} does not train "
            f"(it trains {', '.join(sorted(FAMILIES[task]))}{' and language models' if task in ANY else ''})"
        )
    return cast(Family, importlib.import_module(module))


def model_type_of(source: ModelSource) -> str:
    """The ``model_type`` of a model that was found; empty where its configuration has none."""
    try:
        values = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(values.get("model_type", "")) if isinstance(values, dict) else ""


def knows_stt(source: ModelSource) -> bool:
    """Whether a model that was found recognises speech."""
    return model_type_of(source) in FAMILIES["stt"]


def knows_tts(source: ModelSource) -> bool:
    """Whether a model that was found speaks, as far as its configuration shows it."""
    return model_type_of(source) in FAMILIES["tts"] or (source.path / "speech.json").is_file()


def load_for_training(source: ModelSource, config: TrainConfig, device: Device, head: str) -> Any:
    return _by_source(source, config).load_for_training(source, config, device, head)


def load_processor(source: ModelSource, config: TrainConfig, tokenizer: Any) -> Any:
    return _by_source(source, config).load_processor(source, config, tokenizer)


def adapter_options(model: Any, config: TrainConfig) -> dict[str, Any]:
    return family_of(config.task, model.config.model_type, config.model).adapter_options(model, config)


def dataset(job: Any, rows: Any, name: str) -> Any:
    return _by_job(job).dataset(job, rows, name)


def collator(job: Any) -> Any:
    return _by_job(job).collator(job)


def trainer(job: Any) -> Any:
    return _by_job(job).trainer(job)


def evaluate(job: Any) -> Any:
    return _by_job(job).evaluate(job)


def fast(model: Any) -> Any:
    """Fast layers of a family of its own; None where ft_core's are made for it."""
    from ft_core.fast.find import unwrapped

    model_type = unwrapped(model).config.model_type
    module = FAMILIES["stt"].get(model_type) or FAMILIES["tts"].get(model_type)
    return None if module is None else importlib.import_module(module).fast(model)


def verify(source: ModelSource, device: Device, **settings: Any) -> Any:
    """What ``ft verify`` compares; None of a language model, of which that is text.

    Raises:
        ModelError: the family has nothing to compare.
    """
    model_type = model_type_of(source)
    module = FAMILIES["stt"].get(model_type) or FAMILIES["tts"].get(model_type)
    if module is None:
        return None  # a language model
    prepare = getattr(importlib.import_module(module), "verify", None)
    if prepare is None:
        raise ModelError(f"the model {source.reference} is a {model_type}, which ft verify does not compare yet")
    return prepare(source, device, **settings)


def _by_source(source: ModelSource, config: TrainConfig) -> Family:
    return family_of(config.task, model_type_of(source), source.reference)


def _by_job(job: Any) -> Family:
    return family_of(job.config.task, job.model.config.model_type, job.config.model)
