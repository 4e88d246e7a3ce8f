"""Preference and reinforcement learning for ft.

Installed, it gives ``ft train`` the methods ``reward``, ``dpo``, ``orpo``, ``kto``, ``grpo``, ``gspo`` and ``ppo``. Its
objectives are plain functions of tensors:

>>> from ft_rl.objectives import bradley_terry
"""

__all__ = ["__version__"]
__version__ = "0.1.0"
