"""Preference and reinforcement learning for ft: reward modelling, with more methods to follow.

Installed, it gives ``ft train`` the method ``reward``. Its objectives are plain functions of tensors:

>>> from ft_rl.objectives import bradley_terry
"""

__all__ = ["__version__"]
__version__ = "0.1.0"
