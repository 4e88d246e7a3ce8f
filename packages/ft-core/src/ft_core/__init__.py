"""Fine-tune language models on the GPU you have.

>>> import ft_core as ft
>>> model, tokenizer = ft.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
>>> model = ft.add_lora(model, r=16)  # doctest: +SKIP

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ft_core.adapters import add_lora
    from ft_core.config import TrainConfig
    from ft_core.errors import FtError
    from ft_core.evaluation import evaluate
    from ft_core.generation import generate
    from ft_core.models import load
    from ft_core.training import train

__version__ = "0.1.0"

__all__ = ["FtError", "TrainConfig", "__version__", "add_lora", "evaluate", "generate", "load", "train"]

_HOMES = {
    "FtError": "ft_core.errors",
    "TrainConfig": "ft_core.config",
    "add_lora": "ft_core.adapters",
    "evaluate": "ft_core.evaluation",
    "generate": "ft_core.generation",
    "load": "ft_core.models",
    "train": "ft_core.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
