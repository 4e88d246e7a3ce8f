"""Norms of the rows of a weight with its low-rank update, which DoRA divides by."""

__all__: list[str] = []
