"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib
import subprocess
import sys

EXPECTED = {
    "ft_rl": ["__version__"],
    "ft_rl.objectives": [
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
    ],
    "ft_rl.objectives.bradley_terry": ["bradley_terry"],
    "ft_rl.objectives.dpo": ["DPOLoss", "dpo"],
    "ft_rl.objectives.gae": ["gae", "whiten"],
    "ft_rl.objectives.group_advantages": ["RewardScale", "group_advantages"],
    "ft_rl.objectives.grpo": ["GRPOLoss", "ImportanceLevel", "grpo", "overlong_penalty"],
    "ft_rl.objectives.kl": ["KLEstimator", "kl"],
    "ft_rl.objectives.kto": ["KTOLoss", "kto", "kto_kl"],
    "ft_rl.objectives.orpo": ["orpo"],
    "ft_rl.objectives.ppo": ["AdaptiveKL", "FixedKL", "penalised_rewards", "ppo_policy", "ppo_value"],
    "ft_rl.objectives.precision": ["bounded_exp", "widen"],
    "ft_rl.objectives.sampler": ["sampler_weights"],
    "ft_rl.objectives.tokens": ["check_tokens", "flatten", "sequence_lengths", "sequence_sums", "unflatten"],
    "ft_rl.pairs": ["Pairs", "show", "tokenize_pairs"],
    "ft_rl.plugin": ["REWARD"],
    "ft_rl.reward": ["RewardSettings", "build", "evaluate"],
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(sys.modules.get(module) or importlib.import_module(module), name) is not None


def test_checking_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, ft_rl, ft_rl.plugin, ft_rl.reward, ft_rl.pairs\n"
        "print({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
