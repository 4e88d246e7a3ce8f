"""The commands that ft-speech adds to ``ft``."""

from __future__ import annotations

__all__: list[str] = []
