"""``python -m ft_kernels.bench``: how fast the operations are on this machine, beside others'."""

__all__: list[str] = []
