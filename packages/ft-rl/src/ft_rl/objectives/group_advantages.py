"""The advantage of a completion over the others of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ft_rl.objectives.precision import widen

__all__ = ["RewardScale", "group_advantages"]

RewardScale = Literal["group", "batch", "none"]

STABILITY = 1e-4
"""What is added to a standard deviation before dividing by it; TRL's."""


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale: RewardScale = "group"
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Rewards less their group's mean, over a standard deviation.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r_{group(i)})}{\mathrm{std}(r) + 10^{-4}}

    With ``group`` the deviation is the group's: section 4.1.2 of Shao et al. 2024 (GRPO, arXiv:2402.03300). With
    ``batch`` it is that of all rewards, as Liu et al. 2025 recommend (arXiv:2508.08221). With ``none`` nothing is
    divided: that is Dr. GRPO, of Liu et al. 2025 (arXiv:2503.20783), who show that dividing gives prompts that are
    nearly always or nearly never solved too much weight. Deviations are unbiased (over K - 1).

    A reward of NaN is one that could not be given: it counts in no mean and no deviation, and its advantage is 0. An
    infinite one is taken for such, or it would make its whole group's advantages infinite.

    Args:
        rewards: of shape [G * K], the K completions of a prompt next to each other.
        num_generations: K.
        scale: ``"group"``, ``"batch"`` or ``"none"``.

    Returns:
        The advantages, of shape [G * K], without gradients, float32 (float64 for float64 rewards). Where all rewards of
        a group are equal they are 0, up to rounding. And detached scalars: ``reward_mean`` and ``reward_std``, of all
        rewards that were given, and ``zero_std``, the share of completions whose deviation (the one of ``scale``; for
        ``none`` the group's) is 0, which teach nothing.

    Raises:
        ValueError: the rewards are not of shape [G * K], or ``scale`` is not one of the three.
    """
    if rewards.ndim != 1 or num_generations < 1 or rewards.numel() == 0 or rewards.numel() % num_generations:
        raise ValueError(
            f"rewards are of shape [G * {num_generations}], num_generations a prompt, G > 0, not {list(rewards.shape)}"
        )
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is 'group', 'batch' or 'none', not {scale!r}")
    rewards = widen(rewards.detach())
    groups = torch.where(rewards.isfinite(), rewards, torch.nan).view(-1, num_generations)
    deviation = _std(groups) if scale == "batch" else _std(groups, dim=1)
    deviation = deviation.expand_as(groups)
    advantages = groups - groups.nanmean(dim=1, keepdim=True)
    if scale != "none":
        advantages = advantages / (deviation + STABILITY)
    metrics = {
        "reward_mean": groups.nanmean(),
        "reward_std": _std(groups).reshape(()),
        # 1e-8 is isclose's own tolerance
        "zero_std": torch.isclose(deviation, torch.zeros_like(deviation)).to(groups.dtype).mean(),
    }
    return advantages.nan_to_num(nan=0.0).view(-1), metrics


def _std(values: Tensor, dim: int | None = None) -> Tensor:
    """The unbiased standard deviation of what is not NaN, with its dimensions kept; that of one value alone is 0 if it
    is the only one asked about, and NaN if the others are NaN."""
    size = values.numel() if dim is None else values.shape[dim]
    if size == 1:
        return torch.zeros_like(values)
    dims = tuple(range(values.ndim)) if dim is None else (dim,)
    count = (~values.isnan()).sum(dims, keepdim=True)
    squares = (values - values.nanmean(dims, keepdim=True)).square().nansum(dims, keepdim=True)
    return (squares / torch.where(count > 1, count - 1, torch.nan)).sqrt()
