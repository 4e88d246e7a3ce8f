"""Rotary position embedding."""

__all__: list[str] = []
