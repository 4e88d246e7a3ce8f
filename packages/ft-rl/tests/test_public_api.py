"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib
import subprocess
import sys

EXPECTED = {
    "ft_rl": ["__version__"],
    "ft_rl.objectives": ["bradley_terry"],
    "ft_rl.objectives.bradley_terry": ["bradley_terry"],
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
