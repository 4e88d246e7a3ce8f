"""Models for Ollama: a GGUF file and a Modelfile whose template is proven equal to the chat template (``export``)."""

from __future__ import annotations

__all__: list[str] = []
