"""Gated linear units: SwiGLU and GEGLU."""

__all__: list[str] = []
