"""The quickstart, `python -m ft_core.quickstart`: a small model learns to write dates in ISO form."""

__all__: list[str] = []
