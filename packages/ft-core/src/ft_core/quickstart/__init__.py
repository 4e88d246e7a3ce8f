"""The quickstart: a small model learns to write dates in ISO form, from data made on the spot. `python -m ft_core.quickstart`."""

__all__: list[str] = []
