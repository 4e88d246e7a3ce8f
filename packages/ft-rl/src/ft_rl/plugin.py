"""What ft-rl registers."""

from __future__ import annotations

from ft_core.plugins.specs import MethodSpec

__all__ = ["REWARD"]

REWARD = MethodSpec(
    name="reward",
    summary="reward modelling: a score that ranks the chosen answer above the rejected one",
    settings="ft_rl.reward:RewardSettings",
    trainer="ft_rl.reward:build",
    evaluate="ft_rl.reward:evaluate",
    formats=("preference",),
    head="score",
)
