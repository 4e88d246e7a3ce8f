"""Merge adapters and convert models to GGUF, checked in the engine that will serve them."""

__all__ = ["__version__"]
__version__ = "0.1.0"
