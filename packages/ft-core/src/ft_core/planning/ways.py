"""What would make a configuration fit that doesn't: each way is planned itself before it is named."""

from __future__ import annotations

from collections.abc import Iterator

from ft_core.config import LoraSettings, TrainConfig
from ft_core.models.positions import positions
from ft_core.planning.cards import CARDS, Card, with_memory
from ft_core.planning.engine import Planner, most, with_length, with_rows

__all__ = ["ways"]

SHORTEST = 128
"""The shortest ``max_length`` that is proposed."""


def ways(planner: Planner, config: TrainConfig, card: Card) -> list[str]:
    """Changes that suffice, the smallest first: single ones, or where none does the fewest together; and a card."""
    single = [said for said, changed in _changes(planner, config, card) if planner.fits(changed, card)]
    found = single or _together(planner, config, card)
    return found + _cards(planner, config)


def _changes(planner: Planner, config: TrainConfig, card: Card) -> Iterator[tuple[str, TrainConfig]]:
    if config.activations not in ("auto", "offload"):
        yield "activations: auto", config.model_copy(update={"activations": "auto"})
    elif config.activations == "offload":
        yield "activations: recompute", config.model_copy(update={"activations": "recompute"})
    if config.memory != "auto":
        free = config.model_copy(update={"memory": "auto"})
        if planner.fits(free, card):
            gib = _least_memory(planner, config, card)
            yield f"memory: {gib}GiB", config.model_copy(update={"memory": f"{gib}GiB"})
    if config.training.optimizer not in ("adamw_8bit", "paged_adamw_8bit"):
        training = config.training.model_copy(update={"optimizer": "adamw_8bit"})
        yield "training.optimizer: adamw_8bit", config.model_copy(update={"training": training})
    rows = planner.largest(config, card)
    if 0 < rows < config.training.batch_size:
        changed = with_rows(config, rows)
        accumulation = changed.training.gradient_accumulation
        yield f"training.batch_size: {rows}, training.gradient_accumulation: {accumulation}", changed
    if config.lora is None:
        yield "lora: {r: 16} (an adapter in place of the whole model)", _adapter(config)
    elif config.quantization != "nf4" and planner.blueprint.stored is None:
        yield "quantization: nf4", config.model_copy(update={"quantization": "nf4"})
    length = planner.longest(config, card)
    if SHORTEST <= length < config.max_length:
        changed, rest = with_length(config, length), ""
        if config.rope_scaling is not None and length <= (positions(planner.blueprint.text) or 0):
            changed, rest = changed.model_copy(update={"rope_scaling": None}), ", without rope_scaling"
        yield f"max_length: {length}, the longest that fits{rest}", changed
    if config.lora is not None:
        for rank in (64, 32, 16, 8, 4):
            lora = config.lora.model_copy(update={"r": rank})
            changed = config.model_copy(update={"lora": lora})
            if rank < config.lora.r and planner.fits(changed, card):
                yield f"lora.r: {rank}", changed
                break


def _together(planner: Planner, config: TrainConfig, card: Card) -> list[str]:
    """The first few of these changes, as many as are needed."""
    words, changed = [], config
    if config.activations != "auto":
        words.append("activations: auto")
        changed = changed.model_copy(update={"activations": "auto"})
    if config.training.batch_size > 1:
        words.append("training.batch_size: 1")
        changed = with_rows(changed, 1)
    if config.lora is None:
        words.append("lora: {r: 16}")
        changed = _adapter(changed)
    if not planner.fits(changed, card) and changed.quantization != "nf4" and planner.blueprint.stored is None:
        words.append("quantization: nf4")
        changed = changed.model_copy(update={"quantization": "nf4"})
    if not planner.fits(changed, card):
        length = planner.longest(changed, card)
        if length < SHORTEST:
            return []
        if length < changed.max_length:
            words.append(f"max_length: {length}")
            changed = with_length(changed, length)
    return [" and ".join(words)] if words and planner.fits(changed, card) else []


def _adapter(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"lora": LoraSettings()})


def _least_memory(planner: Planner, config: TrainConfig, card: Card) -> int:
    bound = card.memory // 2**30 + 1
    return next(
        gib
        for gib in range(1, bound + 1)
        if gib == bound or planner.fits(config.model_copy(update={"memory": f"{gib}GiB"}), card)
    )


def _cards(planner: Planner, config: TrainConfig) -> list[str]:
    """The smallest card on which it fits, by the memory that it takes and by name."""
    free = config.model_copy(update={"memory": "auto"})
    base = with_memory(None, 0)
    gib = most(lambda n: not planner.fits(free, with_memory(base, n * 2**30)), 4096) + 1
    if gib > 4096:
        return []
    fitting = sorted((c for c in CARDS if planner.fits(free, c)), key=lambda c: c.memory)
    names = [c.name for c in fitting if c.memory <= 1.1 * fitting[0].memory][:2]
    return [
        f"a GPU with {gib} GiB" + (f" (the smallest known: {' or '.join(names)})" if names else ", more than any known")
    ]
