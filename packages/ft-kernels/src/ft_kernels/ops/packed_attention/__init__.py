"""Attention among the tokens of a document, for many documents in one row."""

__all__: list[str] = []
