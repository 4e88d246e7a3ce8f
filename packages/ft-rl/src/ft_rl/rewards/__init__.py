"""Rewards: what the configuration's ``rewards`` names, as functions with weights, and those that are built in."""

from ft_rl.rewards.faults import Reward
from ft_rl.rewards.resolving import Rewards, resolve_rewards

__all__ = ["Reward", "Rewards", "resolve_rewards"]
