"""What a micro-batch of each method is to the memory, for ``ft plan``."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from ft_core.config import TrainConfig
from ft_core.config.load import method_settings
from ft_core.planning.load import Held, Load
from ft_rl.rewards.stored import StoredAdapter, stored_adapter
from ft_rl.rollouts.protocol import TOKENS_AT_ONCE

__all__ = ["answers", "completions", "pairs", "pairs_with_reference", "with_values"]


def pairs(config: TrainConfig) -> Load:
    """Two sequences a row; no other pass."""
    return Load(sequences=2)


def pairs_with_reference(config: TrainConfig) -> Load:
    """Two sequences a row, and the reference's pass, unless that was worked out before."""
    return Load(sequences=2, reference=not _beforehand(config), held=_copy(config, not _beforehand(config)))


def answers(config: TrainConfig) -> Load:
    """A sequence a row; beside the reference's pass those for the divergence."""
    settings = method_settings(config)
    reference = not _beforehand(config) or getattr(settings, "loss_type", "kto") == "kto"
    return Load(reference=reference, held=_copy(config, not _beforehand(config)))


def completions(config: TrainConfig) -> Load:
    """A completion a row, and reward models. The reference's pass comes before the one with gradients, when nothing
    waits yet."""
    diverges = bool(getattr(method_settings(config), "beta", 0.0))
    return Load(written=_written(config), held=_copy(config, diverges) + _reward_models(config))


def with_values(config: TrainConfig) -> Load:
    """A completion a row, and reward models; policy and values are two adapters, of which one is computed at a time."""
    return Load(adapters=2, written=_written(config), held=_reward_models(config))


def _beforehand(config: TrainConfig) -> bool:
    wanted = getattr(method_settings(config), "precompute_ref_log_probs", None)
    return config.lora is None if wanted is None else bool(wanted)


def _copy(config: TrainConfig, wanted: bool) -> tuple[Held, ...]:
    """The model as it was, a second time and in float32 as TRL has it, where no adapter can be switched off instead."""
    return (Held("reference model", config.model, itemsize=4),) if wanted and config.lora is None else ()


def _reward_models(config: TrainConfig) -> tuple[Held, ...]:
    """What rewards hold: a whole model each, or its adapter alone where that is put on the policy's base.

    Raises:
        RunError: a run isn't there, or its files cannot be read. ModelError: an adapter's cannot.
    """
    from ft_core.models.opening import check_reference
    from ft_core.runs import Run

    found = []
    for entry in config.rewards or ():
        if entry.name != "reward-model":
            continue
        reference = str(entry.settings["model"])
        check_reference(reference)
        stored = _stored(reference)
        if stored is not None:
            numbers = sum(math.prod(shape) for shape in stored.shapes.values())
            base = stored.reference if stored.why_apart(config) is not None else None
            found.append(Held("reward model", base, "score", stored.quantization, numbers=numbers))
            continue
        run = Run(reference)
        found.append(Held("reward model", str(run.model) if run.path.is_dir() and run.is_run else reference, "score"))
    return tuple(found)


def _stored(reference: str) -> StoredAdapter | None:
    folder = Path(reference).expanduser()
    names = ("config.yaml", "adapter_config.json", "adapter/adapter_config.json", "../config.yaml", "../../config.yaml")
    files = (folder / name for name in names)
    return _stored_then(reference, tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files))


@lru_cache(maxsize=16)
def _stored_then(reference: str, when: tuple[int, ...]) -> StoredAdapter | None:
    """A planner asks hundreds of times; ``when`` the files were written tells whether they may have changed."""
    return stored_adapter(reference)


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
