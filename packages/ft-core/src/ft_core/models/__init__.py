"""Models and tokenizers: found, checked, loaded, quantized, put on the right device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_core.models.device import Device, pick_device
    from ft_core.models.loading import load, load_base, load_for_training, load_run, load_tokenizer
    from ft_core.models.source import ModelSource, find_model

__all__ = [
    "Device",
    "ModelSource",
    "find_model",
    "load",
    "load_base",
    "load_for_training",
    "load_run",
    "load_tokenizer",
    "pick_device",
]

_HOMES = {
    "Device": "device",
    "ModelSource": "source",
    "find_model": "source",
    "pick_device": "device",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(f"ft_core.models.{_HOMES.get(name, 'loading')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
