"""Models for Open WebUI: a model to import, and a compose file that wires it to the engine (``export``)."""

from __future__ import annotations

__all__: list[str] = []
