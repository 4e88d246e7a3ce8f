"""What a micro-batch of each method is to the memory, for ``ft plan``."""

from __future__ import annotations

from ft_core.config import TrainConfig
from ft_core.config.load import method_settings
from ft_core.planning.load import Load
from ft_rl.rollouts.protocol import TOKENS_AT_ONCE

__all__ = ["answers", "completions", "pairs", "pairs_with_reference", "with_values"]


def pairs(config: TrainConfig) -> Load:
    """Two sequences a row; no other pass."""
    return Load(sequences=2)


def pairs_with_reference(config: TrainConfig) -> Load:
    """Two sequences a row, and the reference's pass, unless that was worked out before."""
    return Load(sequences=2, reference=not _beforehand(config))


def answers(config: TrainConfig) -> Load:
    """A sequence a row; beside the reference's pass those for the divergence."""
    settings = method_settings(config)
    return Load(reference=not _beforehand(config) or getattr(settings, "loss_type", "kto") == "kto")


def completions(config: TrainConfig) -> Load:
    """A completion a row. The reference's pass comes before the one with gradients, when nothing waits yet."""
    return Load(written=_written(config))


def with_values(config: TrainConfig) -> Load:
    """A completion a row; policy and values are two adapters, of which one is computed at a time."""
    return Load(adapters=2, written=_written(config))


def _beforehand(config: TrainConfig) -> bool:
    wanted = getattr(method_settings(config), "precompute_ref_log_probs", None)
    return config.lora is None if wanted is None else bool(wanted)


def _written(config: TrainConfig) -> int:
    """Completions that the model writes at a time; none where a server does."""
    settings = method_settings(config)
    engine = getattr(settings, "rollouts", "transformers")
    name = engine if isinstance(engine, str) else engine["engine"]
    if name != "transformers":
        return 0
    t = config.training
    rows = t.batch_size * (getattr(settings, "steps_per_generation", None) or t.gradient_accumulation)
    at_once = int(engine.get("tokens_at_once", TOKENS_AT_ONCE)) if isinstance(engine, dict) else TOKENS_AT_ONCE
    return max(min(rows, at_once // config.max_length), 1)
