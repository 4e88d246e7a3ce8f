"""Engines that write completions during training, behind one protocol."""

from ft_rl.rollouts.protocol import Completion, Engine, Sampling

__all__ = ["Completion", "Engine", "Sampling"]
