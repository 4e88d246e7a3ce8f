"""Linear products with low-rank updates inside."""

__all__: list[str] = []
