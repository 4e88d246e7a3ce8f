"""Objectives as pure functions: tensors in, loss and metrics out.

Those over tokens take them flat, see :mod:`ft_rl.objectives.tokens`.
"""

from ft_rl.objectives.bradley_terry import bradley_terry
from ft_rl.objectives.dpo import dpo
from ft_rl.objectives.gae import gae, whiten
from ft_rl.objectives.group_advantages import group_advantages
from ft_rl.objectives.grpo import grpo, overlong_penalty
from ft_rl.objectives.kl import kl
from ft_rl.objectives.kto import kto, kto_kl
from ft_rl.objectives.orpo import orpo
from ft_rl.objectives.ppo import AdaptiveKL, FixedKL, penalised_rewards, ppo_policy, ppo_value
from ft_rl.objectives.sampler import sampler_weights
from ft_rl.objectives.tokens import flatten, sequence_lengths, sequence_sums, unflatten

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "bradley_terry",
    "dpo",
    "flatten",
    "gae",
    "group_advantages",
    "grpo",
    "kl",
    "kto",
    "kto_kl",
    "orpo",
    "overlong_penalty",
    "penalised_rewards",
    "ppo_policy",
    "ppo_value",
    "sampler_weights",
    "sequence_lengths",
    "sequence_sums",
    "unflatten",
    "whiten",
]
