"""What ft-rl registers."""

from __future__ import annotations

from ft_core.plugins.specs import MethodSpec

__all__ = ["DPO", "KTO", "ORPO", "REWARD"]

REWARD = MethodSpec(
    name="reward",
    summary="reward modelling: a score that ranks the chosen answer above the rejected one",
    settings="ft_rl.reward:RewardSettings",
    trainer="ft_rl.reward:build",
    evaluate="ft_rl.reward:evaluate",
    formats=("preference",),
    head="score",
)

DPO = MethodSpec(
    name="dpo",
    summary="direct preference optimization: chosen answers likelier than rejected ones, against a reference",
    settings="ft_rl.dpo:DpoSettings",
    trainer="ft_rl.dpo:build",
    evaluate="ft_rl.dpo:evaluate",
    formats=("preference",),
)

ORPO = MethodSpec(
    name="orpo",
    summary="odds ratio preference optimization: fine-tuning and preference in one, without a reference",
    settings="ft_rl.orpo:OrpoSettings",
    trainer="ft_rl.orpo:build",
    evaluate="ft_rl.orpo:evaluate",
    formats=("preference",),
)

KTO = MethodSpec(
    name="kto",
    summary="Kahneman-Tversky optimization: answers that are each wanted or not, no pairs needed",
    settings="ft_rl.kto:KtoSettings",
    trainer="ft_rl.kto:build",
    evaluate="ft_rl.kto:evaluate",
    formats=("labelled", "preference"),
)
