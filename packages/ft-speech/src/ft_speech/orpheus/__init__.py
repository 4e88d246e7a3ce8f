"""Language models that speak by writing a codec's tokens, as Orpheus does."""

from __future__ import annotations

__all__: list[str] = []
