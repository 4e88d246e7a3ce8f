"""The product of one row with frozen 16-bit weights."""

__all__: list[str] = []
