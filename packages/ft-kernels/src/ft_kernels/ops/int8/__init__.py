"""bitsandbytes' 8-bit weights."""

__all__: list[str] = []
