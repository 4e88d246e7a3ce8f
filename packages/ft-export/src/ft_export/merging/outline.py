"""A model without its weights: what its parameters are called, which share a tensor, what its files have to hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import check_shape
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.merging.adapter import Adapter, Replacement
from ft_export.merging.names import made_of_others, parameter_names
from ft_export.runs import Rope
from ft_export.seeing import model_class

if TYPE_CHECKING:
    import torch

__all__ = ["Outline", "built"]


class Outline:
    """A base model as transformers builds it, on no device.

    Args:
        folder: the base's. stored: its files; their tensors get the model's names.
        labels: None for a language model, else the outputs of a score head. rope: the rotary scaling to give it.
        rows: how many tokens it is to have, where that is not its own number.

    Attributes:
        shapes: of each parameter, by its name.
        aliases: for each parameter that is tied to another one, the name under which the files have their tensor.
        config: transformers' configuration, to be written beside the merged weights.

    Raises:
        ExportError: transformers does not know the model, or the files lack a weight.
    """

    def __init__(
        self, folder: Path, stored: Checkpoint, labels: int | None, rope: Rope | None, rows: int | None = None
    ) -> None:
        self._model = built(folder, labels, rope, rows)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        self._buffers = {name for name, _ in self._model.named_buffers()}
        self.shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        stored.rename(parameter_names(stored, self._model))
        self.aliases = _tied(parameters, stored)
        self.config = self._model.config
        self._scores = labels is not None
        made = made_of_others(self._model)
        missing = sorted(
            name
            for name in parameters
            if name not in stored
            and name not in self.aliases
            and not (self._scores and name.startswith("score."))
            and not made(name)
        )
        if missing:
            raise ExportError(f"{folder} has no weights for {missing[0]} ({len(missing)} missing): it is incomplete")
        grown = self._vocabulary() if rows is not None else set()
        for name, shape in self.shapes.items():
            if name in stored and name not in grown:
                check_shape(folder, name, stored.shape(name), shape)

    def _vocabulary(self) -> set[str]:
        """The names of the embeddings and of the head."""
        modules = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        weights = [module.weight for module in modules if module is not None]
        parameters = self._model.named_parameters(remove_duplicate=False)
        return {name for name, parameter in parameters if any(parameter is weight for weight in weights)}

    def has(self, name: str) -> bool:
        """Whether a tensor of the base's files belongs to the model; a score head takes the place of another."""
        return not self._scores or name in self.shapes or name in self._buffers

    def rename(self, written: Checkpoint) -> Checkpoint:
        """Give a merged model's tensors the model's names."""
        return written.rename(parameter_names(written, self._model))

    def loosen(self, adapter: Adapter) -> list[str]:
        """The parameters that get a tensor of their own since the adapter changes only one end of tied embeddings.

        While training, the adapter sat on one end alone; merged into the shared tensor it would change both.
        """
        head, embeddings = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        shared = getattr(embeddings, "weight", None)  # several tables in a model that speaks
        if head is None or shared is None or head.weight is not shared:
            return []
        pair = {name for name, p in self._model.named_parameters(remove_duplicate=False) if p is shared}
        if adapter.config.get("ensure_weight_tying") or not pair & set(adapter.changes) or _equal(adapter, pair):
            return []
        self.config.tie_word_embeddings = False
        if hasattr(self.config.get_text_config(), "tie_word_embeddings"):
            self.config.get_text_config().tie_word_embeddings = False
        return sorted(pair & set(self.aliases))

    def save_config(self, folder: Path, dtype: torch.dtype) -> None:
        """Write ``config.json`` for weights of this type."""
        self.config.dtype = dtype
        self.config.architectures = [type(self._model).__name__]
        self.config.save_pretrained(folder)


def _equal(adapter: Adapter, pair: set[str]) -> bool:
    """Whether the adapter holds both ends whole, and alike: PEFT saves them so where the vocabulary has grown."""
    import torch

    changes = [adapter.changes.get(name) for name in sorted(pair)]
    held = [adapter.files.tensor(change.key) for change in changes if isinstance(change, Replacement)]
    return len(held) == len(pair) and all(torch.equal(held[0], other) for other in held[1:])


def built(folder: Path, labels: int | None, rope: Rope | None, rows: int | None = None) -> Any:
    """A folder's transformers model on no device; the arguments are those of :class:`Outline`.

    Raises:
        ExportError: transformers does not know it.
    """
    import torch
    import transformers

    heads: dict[str, Any] = {}
    if labels is not None:
        heads = {"num_labels": labels}
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **heads
        )
        if rope is not None:
            rope.put(config)
        if rows is not None:
            config.get_text_config().vocab_size = rows
        kind: Any = transformers.AutoModelForSequenceClassification if labels is not None else model_class(config)
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ExportError(f"{folder} cannot be loaded: {error}") from error


def _tied(parameters: Mapping[str, Any], stored: Checkpoint) -> dict[str, str]:
    by_tensor: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name in stored:
            by_tensor.setdefault(id(parameter), name)
    found = {name: by_tensor.get(id(parameter), name) for name, parameter in parameters.items()}
    return {name: other for name, other in found.items() if name != other}
