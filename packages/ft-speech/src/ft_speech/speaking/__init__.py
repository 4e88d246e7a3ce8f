"""What the families of speakers share: rows, settings, speaking."""

from __future__ import annotations

__all__: list[str] = []
