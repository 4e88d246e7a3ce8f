"""What the families of recognisers share: rows, settings, augmentation, measuring."""

from __future__ import annotations

__all__: list[str] = []
