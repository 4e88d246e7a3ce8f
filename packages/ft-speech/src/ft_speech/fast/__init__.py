"""Layers of models that listen, computed by ft_kernels on the instance, with the same mathematics."""

__all__: list[str] = []
