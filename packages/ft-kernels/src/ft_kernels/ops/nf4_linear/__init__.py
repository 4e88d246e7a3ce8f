"""Products of few rows with NF4 weights, which are read once, in 4 bits."""

__all__: list[str] = []
