"""Attention of one new token of each sequence over what is kept of it."""

__all__: list[str] = []
