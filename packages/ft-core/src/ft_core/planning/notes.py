"""What a plan says beside its numbers: what is assumed, and what is rough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ft_core.config import TrainConfig
from ft_core.fast.graphs import SHARE as SHARE_RECORDED
from ft_core.fast.recurring import LONGEST
from ft_core.planning.blueprint import Blueprint
from ft_core.planning.cards import Card
from ft_core.planning.load import load_of
from ft_core.planning.peak import Peak
from ft_core.planning.speed import LAUNCHES, Times

if TYPE_CHECKING:
    from ft_core.planning.engine import Planner

__all__ = ["HOST_ASSUMED", "NOTABLE", "notes_of", "why_not_recorded"]

NOTABLE = 0.1
"""The share of a step's time that the GPU waits for the host's launches, from which it is worth a note."""
HOST_ASSUMED = 64 * 2**30
"""Bytes of host memory beside a card that is not here."""


def why_not_recorded(
    blueprint: Blueprint, config: TrainConfig, card: Card, peak: Peak, limit: int
) -> str | None:  # fmt: skip
    """Why steps are computed kernel by kernel even where the host is slower than the GPU, or None."""
    if blueprint.apart:
        return "images come in all numbers and sizes"
    if peak.lent:
        return "weights live in the host's memory"
    if config.memory != "auto":
        return "the memory is bounded"
    if config.max_length > LONGEST:
        return f"documents may have more than {LONGEST} tokens"
    if card.capability < (8, 0):
        return "the card is older than Ampere"
    if not set(peak.choices) <= {"keep", "inputs"}:
        return "layers are computed again, or offloaded"
    # A recording keeps what a step takes to itself.
    room = limit - peak.total + peak.step
    return None if peak.step <= SHARE_RECORDED * room else "a step takes more than half of the memory that is free"


def notes_of(
    planner: Planner, config: TrainConfig, card: Card, peak: Peak, times: Times | None, host: int | None
) -> list[str]:  # fmt: skip
    """What is assumed or rough in a plan, a line each."""
    from ft_core.planning.engine import limit_of

    blueprint, front, notes = planner.blueprint, planner.front(config), []
    if blueprint.layout is None:
        notes.append(
            f"rough: trained on transformers' own layers with checkpointing, logits whole ({blueprint.reason})"
        )
    elif config.lora is None:
        notes.append("rough: full fine-tuning, fp32 weights under autocast; its memory was not measured")
    elif not planner.outline(config).able:
        notes.append("rough: this adapter is computed by single operations, whose memory was not measured")
    if front is not None:
        notes.extend(front.notes)
    load = load_of(config)
    if load.reference or load.written or load.adapters > 1:
        notes.append(f"times are those of one pass with gradients; a step of {config.method} has more")
    if config.packing:
        notes.append(f"rows are assumed full: {config.max_length} tokens each, one document (shorter ones are faster)")
    else:
        notes.append(f"rows are assumed full: {config.max_length} tokens each, the longest batch")
    reason = why_not_recorded(blueprint, config, card, peak, limit_of(config, card))
    if times is not None and times.parts.get(LAUNCHES, 0.0) > NOTABLE * times.batch and reason is not None:
        notes.append(f"steps are launched kernel by kernel, none is recorded: {reason}")
    if not card.peak:
        notes.append("no times: nothing is known of this card but its memory (--gpu names one)")
    elif card.basis == "estimated":
        notes.append(f"times are estimated: ft was never measured on {card.name}")
    elif card.basis == "from H200":
        notes.append("times are estimated from the H200's, which has the same processor")
    if host is None:
        notes.append(f"host memory assumed: {HOST_ASSUMED / 2**30:.0f} GiB")
    return notes
