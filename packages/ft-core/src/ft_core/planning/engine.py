"""The plan of a configuration on a card: memory, choices, micro-batch, time; and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ft_core.config import TrainConfig
from ft_core.fast.choose import MARGIN
from ft_core.fast.recurring import recurring_length
from ft_core.memory import bytes_of
from ft_core.models.positions import positions
from ft_core.models.source import ModelSource
from ft_core.planning.blueprint import Blueprint, Outline, outline_of
from ft_core.planning.cards import Card
from ft_core.planning.front import Front, Fronts, fronts_of
from ft_core.planning.load import Held, load_of
from ft_core.planning.notes import HOST_ASSUMED, notes_of, why_not_recorded
from ft_core.planning.peak import ALONE, TILE, Peak, Step, peak_of
from ft_core.planning.rows import count_rows, steps_of
from ft_core.planning.speed import Times, times_of
from ft_core.planning.variants import most, with_length, with_rows
from ft_core.planning.weights import lent_bytes, states_of, weight_bytes
from ft_core.plugins import MethodSpec, registry
from ft_core.training.arguments import few_steps

__all__ = [
    "CONTEXT", "HOST_ASSUMED", "MOST_ROWS", "Plan", "Planner", "limit_of", "most", "plan", "with_length", "with_rows",
]  # fmt: skip

CONTEXT = 600 * 2**20
"""Bytes that CUDA takes of the card for itself and the kernels that are loaded: 500 to 650 MiB, by card and driver."""
SHARE = 0.8
"""Of the host's memory, what may be pinned (``ft_core.fast.offload``)."""
GAPS = 0.95
"""The share of ``memory`` that is planned with (``ft_core.training.speed``)."""
WHOLE = 0.9
"""The share of the limit up to which a long sequence goes without tiles: the gaps that its few huge tensors leave
between each other are as large as they (61120 tokens, counted as 14.7 GiB, did not fit 16 GiB)."""
WORTH = 0.97
"""The share of a step's predicted time that it must come to with weights in the host's memory to be worth it."""
MOST_ROWS = 4096
"""The largest micro-batch that is tried."""


def limit_of(config: TrainConfig, card: Card) -> int:
    """Bytes that torch's allocated memory may reach: what CUDA leaves of the card, or the configuration's bound."""
    limit = card.memory - CONTEXT
    if config.memory != "auto":
        limit = min(limit, int(GAPS * bytes_of(config.memory)))
    return max(int(limit * (1 - MARGIN)), 0)


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Attributes:
        model: its name. parameters, trained: how many numbers it has, and how many are trained.
        config, card: what was planned, and for which card. limit: bytes that torch's memory may reach.
        peak: memory by part. times: None where nothing is known of the card's speed. recorded: bytes that recorded
            steps may keep beside the peak (:meth:`Planner.recorded`).
        largest: the largest micro-batch that fits (0: none does), up to ``MOST_ROWS``, the largest that is tried;
            ``largest_kept``: with every activation kept.
        steps, counted: optimizer steps of the run (None: unknown), and how they were counted.
        notes: what is assumed or rough, a line each. planner: plans variants of it.
    """

    model: str
    parameters: int
    trained: int
    config: TrainConfig
    card: Card
    limit: int
    host: int
    peak: Peak
    times: Times | None
    recorded: int
    largest: int
    largest_kept: int
    steps: int | None
    counted: str
    notes: tuple[str, ...]
    planner: Planner

    @property
    def fits(self) -> bool:
        """Whether the configuration's micro-batch fits."""
        return self.peak.total <= self.limit and not self.peak.refused

    @property
    def seconds(self) -> float | None:
        """Of the whole run, None if unknown."""
        return None if self.times is None or self.steps is None else self.steps * self.times.step

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values; sizes in bytes, times in seconds."""
        peak, times = self.peak, self.times
        return {
            "model": self.model,
            "parameters": self.parameters,
            "trained": self.trained,
            "card": {"name": self.card.name, "memory": self.card.memory, "basis": self.card.basis},
            "fits": self.fits,
            "memory": {
                "parts": peak.parts, "peak": peak.total, "limit": self.limit, "context": CONTEXT, "moment": peak.moment,
                "host": peak.host + peak.paged + peak.lent, "lent": peak.lent,
                "host_limit": self.host, "disk": peak.disk, "exact": peak.exact,
                "recorded": self.recorded,
            },
            "layers": {choice: peak.choices.count(choice) for choice in dict.fromkeys(peak.choices)},
            "micro_batch": {
                "configured": self.config.training.batch_size, "largest": self.largest,
                "largest_kept": self.largest_kept, "most_tried": MOST_ROWS,
            },
            "tile": peak.tile,
            "tower_again": peak.tower_again,
            "head_rows": peak.head_rows,
            "optimizer": peak.optimizer,
            "time": None if times is None else {
                "micro_batch": times.parts, "update": times.update, "step": times.step,
                "tokens_per_second": times.rate, "run": self.seconds,
            },
            "steps": self.steps,
            "counted": self.counted,
            "notes": list(self.notes),
        }  # fmt: skip


class Planner:
    """Plans variants of a configuration for one model.

    Attributes:
        blueprint: the model's sizes. host: bytes of host memory that may be pinned. disk: bytes of the disk that
            activations may take beyond them. fronts: what stands before the layers. lends: whether frozen weights may
            live in the host's memory.
    """

    def __init__(
        self, blueprint: Blueprint, host: int, disk: int = 0, fronts: Fronts | None = None, lends: bool = True
    ) -> None:  # fmt: skip
        self.blueprint, self.host, self.disk, self.lends = blueprint, host, disk, lends
        self._fronts, self._counted = fronts, dict[Held, int]()

    def front(self, config: TrainConfig) -> Front | None:
        """What stands before the model's layers, None for a model of text."""
        return None if self._fronts is None else self._fronts(config)

    def outline(self, config: TrainConfig) -> Outline:
        """What a configuration trains of the model."""
        return self.blueprint.outline(config.lora, self.front(config))

    def peak(self, config: TrainConfig, card: Card, wanted: str | None = None) -> Peak:
        """The peak of a configuration: with a sequence tile only where it doesn't easily fit without.

        The state of ``adamw_8bit`` is paged to the host only where nothing else makes it fit; and before either is left
        out, nothing goes to the disk. Frozen weights live in the host's memory where it would not fit otherwise, or
        ``auto`` would take longer.
        """
        limit, choice = limit_of(config, card), wanted or config.activations
        own = self._paged(config, card, wanted, False)
        fits = _easily(own, limit)
        if (fits and (choice != "auto" or set(own.choices) == {"keep"})) or not self._may_lend(config, limit):
            return own
        lent = self._paged(config, card, wanted, True)
        if not fits or not _easily(lent, limit):
            return _better(own, lent, limit)
        here, there = self.times(config, card, own), self.times(config, card, lent)
        return lent if here is not None and there is not None and there.step < WORTH * here.step else own

    def _may_lend(self, config: TrainConfig, limit: int) -> bool:
        """Whether weights may live in the host's memory: an adapter of a known family is trained, no completions are
        written, and the weights can be loaded, which they are to the GPU."""
        outline, load = self.outline(config), load_of(config)
        kind = self.blueprint.stored or config.quantization
        bytes_here = weight_bytes(self.blueprint, kind, 2) + 4 * sum(outline.all)
        able = self.blueprint.layout is not None and not outline.full and outline.able
        alone = load.written == 0 and load.sequences == 1 and not load.held and not _adapts_ends(config)
        return (
            self.lends and able and alone and bytes_here <= limit
            and 0 < lent_bytes(self.blueprint, outline, kind).whole <= self.host
        )  # fmt: skip

    def _paged(self, config: TrainConfig, card: Card, wanted: str | None, lends: bool) -> Peak:
        named = config.training.optimizer
        plain = self._peak(config, card, wanted, named, lends)
        if named != "adamw_8bit" or _easily(plain, limit_of(config, card)):
            return plain
        state = states_of(self.outline(config).all, "paged_adamw_8bit").host
        if not 0 < state <= self.host:
            return plain
        paged = self._peak(config, card, wanted, "paged_adamw_8bit", lends)
        fit = paged.total <= limit_of(config, card) and not paged.refused
        return _better(plain, paged, limit_of(config, card)) if fit else plain

    def _peak(
        self, config: TrainConfig, card: Card, wanted: str | None, optimizer: str, lends: bool = False
    ) -> Peak:  # fmt: skip
        """A tower's layers are computed again where that was asked for, or where nothing fits without."""
        front, choice = self.front(config), wanted or config.activations
        kept = self._tiled(config, card, wanted, optimizer, front, lends)
        if front is None or front.kept_again >= front.kept or choice == "keep":
            return kept
        if choice == "auto" and self.blueprint.layout is not None and _easily(kept, limit_of(config, card)):
            return kept
        lean = self._tiled(config, card, wanted, optimizer, front.again(), lends)
        return lean if choice != "auto" else _better(kept, lean, limit_of(config, card))

    def _tiled(
        self, config: TrainConfig, card: Card, wanted: str | None, optimizer: str, front: Front | None, lends: bool
    ) -> Peak:  # fmt: skip
        outline, limit = self.outline(config), limit_of(config, card)

        def peak(tile: int | None, choice: str | None = wanted) -> Peak:
            return peak_of(self.blueprint, outline, self._step(config, card, tile, choice, optimizer, front, lends))

        whole = peak(None)
        tokens = config.training.batch_size * load_of(config).sequences * config.max_length
        if not outline.able or tokens <= TILE or wanted == "keep" or _easily(whole, int(WHOLE * limit)):
            return whole
        # What `auto` chooses fills the memory; whether that was easy, the leanest says.
        lean = whole
        if (wanted or config.activations) == "auto" and _easily(whole, limit):
            lean = min((peak(None, choice) for choice in ALONE), key=lambda one: (one.refused, one.total))
            if _easily(lean, int(WHOLE * limit)):
                return whole
        tiled = peak(TILE)
        is_less = lean is not whole or tiled.total < whole.total
        return tiled if is_less and _easily(tiled, limit) else _better(whole, tiled, limit)

    def fits(self, config: TrainConfig, card: Card, wanted: str | None = None) -> bool:
        """Whether it fits; ``wanted`` instead of the configuration's ``activations``."""
        free = (wanted or config.activations) == "auto" and self.blueprint.layout is not None
        # One choice for all layers is quick to count; which mix is the fastest is not asked here.
        if free and any(self.fits(config, card, choice) for choice in ALONE):
            return True
        peak = self.peak(config, card, wanted)
        return peak.total <= limit_of(config, card) and not peak.refused

    def largest(self, config: TrainConfig, card: Card, wanted: str | None = None) -> int:
        """The most rows of a micro-batch that fit; 0 if not even one does."""
        return most(lambda rows: self.fits(with_rows(config, rows), card, wanted), MOST_ROWS)

    def longest(self, config: TrainConfig, card: Card) -> int:
        """The longest ``max_length`` that fits, within the model's positions; a multiple of 64, or 0."""
        bound = max(positions(self.blueprint.text) or 2**22, config.max_length)
        steps = most(lambda n: self.fits(with_length(config, 64 * n), card), max(bound // 64, 1))
        return 64 * steps

    def times(self, config: TrainConfig, card: Card, peak: Peak) -> Times | None:
        """Of a step of it."""
        outline = self.outline(config)
        recorded = why_not_recorded(self.blueprint, config, card, peak, limit_of(config, card)) is None
        front = self.front(config)
        front = front.again() if front is not None and peak.tower_again else front
        step = self._step(config, card, peak.tile, None, peak.optimizer, front, bool(peak.lent))
        return times_of(
            self.blueprint, outline, step, peak, card, config.training.gradient_accumulation, recorded
        )  # fmt: skip

    def recorded(self, config: TrainConfig, card: Card, peak: Peak, times: Times | None) -> int:
        """Bytes that recorded steps (``ft_core.fast.graphs``) may keep to themselves beside the peak; 0 without any.

        All recordings share one pool, as large as the longest one's step at its peak, whose row was filled up to a
        length that comes again; a step of another shape is computed beside it. torch counts the pool as reserved and
        never as allocated, and nothing is recorded unless a step takes no more than half of what is free: so it is no
        part of the peak, and decides nothing about what fits. Rows of documents are recorded where the host sets the
        pace, which cannot be told of a card whose speed is not known.

        Measured of SmolLM2's shape on an H200 (``benchmarks/recorded.py``): 1.65 GiB reserved for rows of up to 4096
        tokens, counted as 1.76; 0.64 for up to 1024, counted as 0.44: what torch's blocks and several recordings leave
        unused in the pool is not counted.
        """
        outline = self.outline(config)
        if times is None or not times.replayed or not (outline.able or outline.full):
            return 0
        step = self._step(config, card, peak.tile, "keep", peak.optimizer)
        filled = replace(step, rows=1, length=recurring_length(step.tokens))
        return peak_of(self.blueprint, outline, filled).step

    def _step(
        self, config: TrainConfig, card: Card, tile: int | None, wanted: str | None, optimizer: str,
        front: Front | None = None, lends: bool = False,
    ) -> Step:  # fmt: skip
        load, outline = load_of(config), self.outline(config)
        kind = self.blueprint.stored or config.quantization
        taken = lent_bytes(self.blueprint, outline, kind).whole if lends else 0
        return Step(
            rows=config.training.batch_size * load.sequences,
            length=config.max_length,
            load=load,
            quantization=config.quantization,
            optimizer=optimizer,
            accumulates=config.training.gradient_accumulation > 1,
            wanted=wanted or config.activations,
            limit=limit_of(config, card),
            # Activations have what weights and the optimizer's state leave of it.
            host=max(self.host - taken - load.adapters * states_of(outline.all, optimizer).host, 0),
            disk=self.disk,
            tile=tile,
            dense=card.capability >= (9, 0),
            held=self._held(load.held),
            front=front,
            lends=lends,
        )

    def _held(self, each: Sequence[Held]) -> dict[str, int]:
        """Bytes by part."""
        sizes: dict[str, int] = {}
        for one in each:
            if one not in self._counted:
                self._counted[one] = _bytes_of(one)
            sizes[one.part] = sizes.get(one.part, 0) + self._counted[one]
        return sizes


def _adapts_ends(config: TrainConfig) -> bool:
    """Whether something is trained of the embedding or the head, whose weights then stay."""
    if config.lora is None:
        return True
    named = [*(config.lora.modules_to_save or ())]
    named += [] if isinstance(config.lora.targets, str) else config.lora.targets
    return any("embed" in name or name.rpartition(".")[2] in ("lm_head", "score") for name in named)


def _bytes_of(held: Held) -> int:
    if held.model is None:
        return 4 * held.numbers
    other = Blueprint.of(outline_of(held.model), held.head)
    return 4 * held.numbers + weight_bytes(other, other.stored or held.quantization, held.itemsize)


def _easily(peak: Peak, limit: int) -> bool:
    """Whether it fits, without the disk."""
    return peak.total <= limit and not peak.disk


def _better(one: Peak, other: Peak, limit: int) -> Peak:
    """What fits, or else is less; of two that fit what leaves less on the disk, or else the first."""
    return min(one, other, key=lambda peak: (max(peak.total - limit, 0), peak.disk))


def plan(
    config: TrainConfig,
    source: ModelSource,
    card: Card,
    *,
    host: int | None = None,
    disk: int = 0,
    quick: bool = False,
    lends: bool = True,
) -> Plan:
    """Predict what a configuration takes on a card, before anything is loaded.

    Args:
        config: checked, with its ``max_length`` within the model's positions.
        source: the model's folder, of which only ``config.json`` is read.
        host: bytes of host memory; None for ``HOST_ASSUMED``, a machine that is not here.
        disk: bytes of the disk for activations that the host's memory cannot hold.
        quick: leave out the largest micro-batch, and count no rows.
        lends: whether frozen weights may live in the host's memory, which they may in one process alone.

    Raises:
        ModelError: the model's configuration cannot be used, or that of another that the method holds beside it.
    """
    spec = registry().get(MethodSpec, config.method)
    fronts = fronts_of(config, source)
    known = () if fronts is None else (fronts.auto, fronts.modules)
    blueprint = Blueprint.of(source, spec.head, *known)
    planner = Planner(blueprint, int(SHARE * (HOST_ASSUMED if host is None else host)), disk, fronts, lends)
    peak, front = planner.peak(config, card), planner.front(config)
    row_tokens = None if front is None else front.row_tokens
    steps, counted = steps_of(config, None if quick else count_rows(config), row_tokens, text=front is None)
    outline, times = planner.outline(config), planner.times(config, card, peak)
    doubt = None if steps is None else few_steps(config, steps)
    return Plan(
        model=source.name,
        parameters=blueprint.parameters,
        trained=sum(outline.all),
        config=config,
        card=card,
        limit=limit_of(config, card),
        host=planner.host,
        peak=peak,
        times=times,
        recorded=planner.recorded(config, card, peak, times),
        largest=0 if quick else planner.largest(config, card),
        largest_kept=0 if quick else planner.largest(config, card, "keep"),
        steps=steps,
        counted=counted,
        notes=(*([doubt] if doubt else []), *notes_of(planner, config, card, peak, times, host)),
        planner=planner,
    )
