"""Root mean square normalization."""

__all__: list[str] = []
