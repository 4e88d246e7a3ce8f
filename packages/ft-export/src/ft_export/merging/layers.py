"""Merging an attached adapter layer by layer, and what tied embeddings ask for."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.merging.adapter import Adapter

if TYPE_CHECKING:
    import torch

__all__ = ["merge_layers", "tied_names", "untie"]


def merge_layers(model: Any, adapter: Adapter, dtype: torch.dtype) -> Any:
    """Attach the adapter and merge it, one layer at a time in fp32; the result is in ``dtype``.

    PEFT's own code does the merging, since it knows its variants; only the type it works in is ours.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        wrapped = PeftModel.from_pretrained(model, adapter.folder, is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"PEFT cannot attach {adapter.folder} to its base: {error}") from error
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of ties that were loosened and of layers merged before
        for name, module in list(wrapped.named_modules()):
            if isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer()
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.float()
                try:
                    module.merge(safe_merge=True)
                except ValueError as error:
                    raise ExportError(
                        f"PEFT cannot merge {name.removeprefix('base_model.model.')} of {adapter.folder}: {error}"
                    ) from error
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        merged = wrapped.merge_and_unload()
    merged.to(dtype)
    merged.config.dtype = dtype
    return merged


def tied_names(names: dict[str, Any], stored: Checkpoint) -> dict[str, str]:
    """For each parameter that is tied to another one, the name under which their tensor is stored."""
    by_tensor: dict[int, str] = {}
    for name, parameter in names.items():
        if name in stored:
            by_tensor.setdefault(id(parameter), name)
    found = {name: by_tensor.get(id(parameter), name) for name, parameter in names.items()}
    return {name: other for name, other in found.items() if name != other}


def untie(model: Any, adapter: Adapter) -> None:
    """Give the head a copy of its own where the adapter changes only one end of tied embeddings.

    While training, the adapter sat on one end alone; merged into the shared tensor it would change both.
    """
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return
    if adapter.config.get("ensure_weight_tying"):
        return
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p is embeddings.weight}
    if names & set(adapter.changes):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
