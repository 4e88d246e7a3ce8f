"""One module a model family: how its decoder maps onto the fast layers, registered as ``ft.architectures``."""

__all__: list[str] = []
