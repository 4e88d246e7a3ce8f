"""The configuration of a run: its schema, and how it is read, overridden and checked before anything is loaded."""

from ft_core.config.load import load_config, parse_overrides, to_yaml
from ft_core.config.rope import RopeScaling
from ft_core.config.schema import DataSource, LoraSettings, RewardEntry, TrainConfig, TrainingSettings

__all__ = [
    "DataSource",
    "LoraSettings",
    "RewardEntry",
    "RopeScaling",
    "TrainConfig",
    "TrainingSettings",
    "load_config",
    "parse_overrides",
    "to_yaml",
]
