"""What a file calls a tensor and what the model calls it: transformers renames some weights when it loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["made_of_others", "parameter_names"]


def made_of_others(model: Any) -> Callable[[str], bool]:
    """Tells of a parameter's name whether transformers stacks or splits tensors of other names into it (experts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    converters = [t for t in get_model_conversion_mapping(model) if not isinstance(t, WeightRenaming)]
    targets = [target.strip("^$").replace("\\", "") for t in converters for target in t.target_patterns]
    return lambda name: any(target in name for target in targets)


def parameter_names(keys: Iterable[str], model: Any) -> dict[str, str]:
    """For each of a checkpoint's keys the name that ``model`` has for it; a key that is not renamed maps to itself.

    Only names that stand for one tensor each are translated. Keys of tensors that transformers stacks or splits while
    loading (experts) keep their names: they are compared file against file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    names: dict[str, str] = {}
    for key in keys:
        new, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        names[key] = key if converted is not None or new not in known else new
    if len(set(names.values())) < len(names):  # two tensors under one name would hide each other
        return {key: key for key in names}
    return names
