"""Merge adapters, convert models to GGUF, checked in the engine that will serve them, and push them to the Hub."""

from __future__ import annotations

from typing import Any

from ft_export.errors import ExportError

__all__ = ["ExportError", "__version__", "export_gguf", "export_hub", "merge"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is heavy when it is first asked for."""
    if name == "merge":
        from ft_export.merging import merge

        return merge
    if name == "export_gguf":
        from ft_export.gguf.export import export

        return export
    if name == "export_hub":
        from ft_export.hub.export import export as push

        return push
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
