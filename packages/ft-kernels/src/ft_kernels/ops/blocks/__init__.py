"""The halves of a decoder layer, each as one step forward and one backward."""

__all__: list[str] = []
