"""A gated multilayer perceptron with low-rank updates inside its products."""

__all__: list[str] = []
