"""A model that a trainer has wrapped, as it was loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["as_loaded"]


@contextmanager
def as_loaded(model: Any) -> Iterator[None]:
    """Within it the model computes as one that was loaded does: accelerate has wrapped its forward in autocast."""
    plain, wrapped = vars(model).get("_original_forward"), vars(model).get("forward")
    if plain is None or wrapped is None:
        yield
        return
    model.forward = plain
    try:
        yield
    finally:
        model.forward = wrapped
