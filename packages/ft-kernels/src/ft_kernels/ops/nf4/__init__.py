"""bitsandbytes' 4-bit NormalFloat weights."""

__all__: list[str] = []
