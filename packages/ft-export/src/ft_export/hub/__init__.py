"""Pushing a model, an adapter or a GGUF file to the Hugging Face Hub, with a card that its run's files bear out."""

from ft_export.hub.wanted import TYPES, Wanted

__all__ = ["TYPES", "Wanted"]
