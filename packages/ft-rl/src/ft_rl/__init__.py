"""Preference and reinforcement learning for ft: reward modelling, with more methods to follow."""

__all__ = ["__version__"]
__version__ = "0.1.0"
