"""Objectives as pure functions: tensors in, loss and metrics out."""

from ft_rl.objectives.bradley_terry import bradley_terry

__all__ = ["bradley_terry"]
