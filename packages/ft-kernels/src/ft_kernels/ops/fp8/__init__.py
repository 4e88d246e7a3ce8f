"""Quantization to 8-bit floating point, e4m3."""

__all__: list[str] = []
