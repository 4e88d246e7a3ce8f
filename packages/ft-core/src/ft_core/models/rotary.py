"""Rotary embeddings whose angles follow the length of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CHANGING", "changes", "rope_types"]

CHANGING = ("dynamic", "longrope")
"""transformers' rotary embeddings whose angles follow the length of the text, on the host or in memory of their own."""


def rope_types(module: Any) -> tuple[str, ...]:
    """The types of a rotary embedding: one, or one for each type of layer (Gemma 3); none of other modules."""
    kinds = getattr(module, "rope_type", None)
    every = kinds.values() if isinstance(kinds, Mapping) else (kinds,)
    return tuple(kind for kind in every if isinstance(kind, str))


def changes(module: Any, among: tuple[str, ...] = CHANGING) -> bool:
    """Whether the module is a rotary embedding of one of these types, for any type of layer."""
    return any(word in kind for kind in rope_types(module) for word in among)
