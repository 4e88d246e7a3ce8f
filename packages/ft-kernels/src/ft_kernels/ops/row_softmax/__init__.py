"""What kernels over rows of logits have in common; no operation of its own."""

__all__: list[str] = []
