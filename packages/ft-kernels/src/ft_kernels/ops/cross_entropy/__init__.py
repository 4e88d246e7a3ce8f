"""Cross-entropy from logits."""

__all__: list[str] = []
