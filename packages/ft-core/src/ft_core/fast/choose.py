"""What each layer keeps, so that a step is as fast as the memory allows.

Counted first: what a layer keeps a token follows from its sizes (see ``ft_kernels.attention_block``). Where that leaves
little room, measured: a first batch with as little kept as can be shows what all else takes, and the rest is spent.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ft_core.fast.again import CHOICES, Choice, in_words
from ft_core.fast.layout import Layout
from ft_core.fast.recurring import recurring_length

__all__ = ["Chooser", "Sizes", "counted", "fit", "fit_on_disk"]

WORK: dict[Choice, float] = {"keep": 0.0, "inputs": 0.65, "offload": 0.7, "recompute": 0.85, "offload-input": 0.9}
"""What a choice costs a step, in forward passes of the layer: q, k, v, gate and up are two thirds of its products, down
is a quarter; copies run beside them."""
LEFT_HERE: tuple[Choice, ...] = ("keep", "inputs")
"""What needs no copy to the host and no whole layer again, and so comes first."""
AWAY: tuple[Choice, ...] = ("offload", "offload-input")
"""What leaves tensors on the host."""
COUNTED = 0.75
"""The share of the free memory that counted activations may fill; what is measured may fill all but MARGIN."""
MARGIN = 0.01
SLACK = 2**25
"""Bytes by which memory in use may grow before the choice is made anew: a batch's own tensors."""
HEAD = 2**30
"""Bytes for the head at most, and a share of what is free where that is little; at least HEAD_LEAST."""
TILE = 4096
"""Tokens of a sequence tile: enough to fill a large card."""
HEAD_SHARE, HEAD_LEAST = 0.45, 2**27
LOGITS = 12
"""Bytes of each logit where the head is not the fast path's: in 16 bits, in fp32, and its gradient."""
TRAINED = 12
"""Bytes for the gradient and the optimizer's state of a trained number, until they are there: fp32 AdamW."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one layer, each for one token.

    Attributes:
        kept: what waits for backward on the GPU, by choice.
        host: what waits in host memory, by choice.
        working: what computing a layer backwards takes beside it.
    """

    kept: dict[Choice, int]
    host: dict[Choice, int]
    working: int

    @classmethod
    def of(cls, layout: Layout, text: Any, able: bool, itemsize: int = 2, ranks: int = 128) -> Sizes:
        """Of a layer.

        Args:
            text: the text model's configuration.
            able: whether the halves are one operation each; the single operations keep more.
            itemsize: bytes of a number. ranks: of all adapters of the layer together.
        """
        hidden, inner = text.hidden_size, text.intermediate_size
        queries, keys = layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
        low, sums = ranks * itemsize, 8 + 4 * layout.heads
        inputs = (2 * hidden + queries) * itemsize + low + sums
        most = inputs + (queries + 2 * keys + 2 * inner) * itemsize
        single = most + (2 * hidden + queries + 2 * keys + inner) * itemsize
        working = (3 * inner + 6 * hidden + queries + 2 * keys) * itemsize
        kept: dict[Choice, int]
        kept = {"keep": most, "inputs": inputs, "recompute": hidden * itemsize, "offload": low + sums}
        if not able:
            kept |= {"keep": single, "inputs": kept["recompute"], "offload": 0}
            working += single
        moved = (2 * hidden + queries if able else hidden) * itemsize
        host: dict[Choice, int] = {"offload": moved, "offload-input": hidden * itemsize}
        return cls({**kept, "offload-input": 0}, host, working)


def counted(tokens: int, sizes: Sizes, trained: int, head: int = 0) -> int:
    """Bytes that a step takes beside weights, and beside what layers keep.

    Args:
        tokens: of the batch.
        trained: how many numbers are trained: each has a gradient and the optimizer's state.
        head: what the head uses at a time; it and a layer's backward pass come one after the other.
    """
    return max(tokens * sizes.working, head) + TRAINED * trained


def fit(layers: int, tokens: int, room: int, sizes: Sizes, host: int) -> list[Choice]:
    """The fastest choices that fit, first layer first; the leanest ones if none do.

    Args:
        tokens: of the batch, padding included.
        room: bytes for what the layers keep, on the GPU. host: in host memory.

    Returns:
        A choice for each layer. The last layers keep the most: backward begins with them.
    """
    each = {choice: tokens * size for choice, size in sizes.kept.items()}
    moved = {choice: tokens * size for choice, size in sizes.host.items()}
    best: tuple[float, float] | None = None
    counts: dict[Choice, int] = {}
    for kept in range(layers + 1):
        for inputs in range(layers - kept + 1):
            for offloaded in range(layers - kept - inputs + 1):
                rest = layers - kept - inputs - offloaded
                used = kept * each["keep"] + inputs * each["inputs"] + offloaded * each["offload"]
                left = host - offloaded * moved["offload"]
                if left < 0:
                    break
                # As many whole layers computed again from the GPU's memory as there is room for, at least those that
                # the host has none for.
                needed = rest - left // moved["offload-input"]
                again = min(rest, max((room - used) // max(each["recompute"], 1), needed, 0))
                used += again * each["recompute"]
                work = WORK["inputs"] * inputs + WORK["offload"] * offloaded + WORK["recompute"] * again
                work += WORK["offload-input"] * (rest - again)
                if best is None or (max(used - room, 0), work) < best:
                    best = max(used - room, 0), work
                    counts = {
                        "offload-input": rest - again, "offload": offloaded, "recompute": again, "inputs": inputs,
                        "keep": kept,
                    }  # fmt: skip
    return [choice for choice, count in counts.items() for _ in range(count)]


def fit_on_disk(
    layers: int, tokens: int, room: int, sizes: Sizes, host: int, disk: Callable[[], int], needed: int
) -> list[Choice]:
    """As :func:`fit`; where that keeps more than ``needed`` bytes on the GPU, so much of ``disk`` is used.

    A disk is slow, so no more of it than that, however much faster the layers would be without counting it.
    """
    plan = fit(layers, tokens, room, sizes, host)
    over = sum(tokens * sizes.kept[choice] for choice in plan) - max(needed, 0)
    if over <= 0:
        return plan
    each = tokens * sizes.host["offload-input"]
    return fit(layers, tokens, room, sizes, host + min(-(-over // each) * each, disk()))


@dataclass
class _Measured:
    """A batch that was computed with little kept.

    Attributes:
        tokens, choices: what was computed. logits: bytes for those of a head that isn't the fast path's.
        before: bytes in use when it began. peak: the highest use until then.
        beside: bytes that it took at its peak, beside what was in use; None until that is known.
    """

    tokens: int
    choices: list[Choice]
    before: int
    peak: int
    logits: int
    went_back: bool = False
    beside: int | None = None


class Chooser:
    """Chooses for one model, batch by batch.

    Attributes:
        wanted: ``auto``, one choice for all layers, or one for each.
        cap: bytes that the GPU's allocated memory may reach, or None for what is free.
        chosen: the last batch's choices, first layer first.
        head: bytes that the head may use at a time.
        tiles: whether a batch has come whose layers would not fit one by one, other than in tiles of ``TILE`` tokens.
        tight: whether a batch has not fitted, so that nothing is kept that was not measured (:meth:`tighten`).
        varies: whether batches of as many tokens leave different amounts of memory, as where a vision tower that is
            trained keeps something of each image.
    """

    def __init__(self, sizes: Callable[[], Sizes], layers: int, trained: Callable[[], int], varies: bool = False):
        self.wanted: Literal["auto"] | Choice | Sequence[Choice] = "auto"
        self.cap: int | None = None
        self.head = self._most_head = HEAD
        self.tight = self.tiles = self._told = False
        self._sizes, self._layers, self._trained, self.varies = sizes, layers, trained, varies
        self.chosen: list[Choice] = ["keep"] * layers
        self._wished = self.chosen
        self._fits = self._held = self._fitted_beside = 0
        self._measured: _Measured | None = None
        self._plans: dict[int, tuple[int, list[Choice]]] = {}

    def want(self, wanted: Literal["auto"] | Choice | Sequence[Choice], cap: int | None) -> None:
        """Take a wish.

        Raises:
            ValueError: there is no such choice, or not one for each layer.
        """
        given = [wanted] * self._layers if isinstance(wanted, str) else list(wanted)
        unknown = sorted(set(given) - {*CHOICES, "auto"} | ({"auto"} & set(given) if wanted != "auto" else set()))
        if unknown:
            raise ValueError(f"no such choice: {unknown[0]!r}; there are {', '.join(CHOICES)}, or auto for all layers")
        if len(given) != self._layers:
            raise ValueError(f"{len(given)} choices for {self._layers} layers")
        if cap is not None and cap <= 0:
            raise ValueError(f"memory={cap}: give a positive number of bytes, or None")
        self.wanted, self.cap, self.head, self._most_head, self.tight = wanted, cap, HEAD, HEAD, False
        self._fits, self._held, self._measured, self._plans = 0, 0, None, {}
        if wanted != "auto":
            self.chosen = self._wished = cast("list[Choice]", given)

    def tighten(self, device: torch.device, share: float, head: int | None = None) -> None:
        """Plan anew after a batch that did not fit: the next one keeps as little as can be, and is measured.

        Args:
            share: of the memory that there is, what is planned with from now on.
            head: bytes for the head at most; None leaves them as they are.
        """
        cap = int(share * _limit(device, self.cap)) if device.type == "cuda" else self.cap
        self.want("auto", cap)
        self.tight = True
        if head is not None:
            self.head = self._most_head = head

    def recordable(self, tokens: int, filled_up: torch.device | None = None) -> bool:
        """Whether a recorded step of such a batch may have memory of its own, as much again as the step takes.

        Args:
            filled_up: where the batch is, if it is a shorter one that was filled up: then nothing so long was computed
                yet, and it must be sure that all can be kept of that, too.
        """
        if self.cap is not None:
            return False
        if self.wanted != "auto":
            return set(self.chosen) <= {"keep", "inputs"}
        if tokens <= self._fits or filled_up is None:
            return tokens <= self._fits or self._measured is None
        if self.tight or self._measured is not None or tokens > recurring_length(self._fits):
            return False
        free = _limit(filled_up, None) - torch.cuda.memory_allocated(filled_up)
        if self._sure(tokens, self._sizes(), free, 0) != "keep":
            return False
        self._fits = tokens
        return True

    def begin(
        self,
        tokens: int,
        device: torch.device,
        host: Callable[[int], int],
        logits: int = 0,
        disk: Callable[[], int] = lambda: 0,
    ) -> list[Choice]:
        """The choices for a batch that is about to be computed, to be differentiated.

        Args:
            tokens: rows times their length.
            host: bytes of host memory that can be had, if so many are wanted.
            logits: how many of them are made at a time; 0 for the fast path's own head.
            disk: gives bytes on the disk that can be had where the host's memory is too little, and nothing else helps.
        """
        if self.wanted != "auto" and tokens > self._held and "offload" in self.wanted:
            self.chosen = self._held_by_host(tokens, host)
        if self._fits_again(tokens, device) or device.type != "cuda" or (self.wanted != "auto" and self.cap is None):
            if self.wanted == "auto":
                self.chosen = ["recompute" if self.tight else "keep"] * self._layers
            return self.chosen
        if self.wanted == "auto":
            self.chosen = self._auto(tokens, device, host, logits, disk)
        self._set_head(_limit(device, self.cap) - torch.cuda.memory_allocated(device))
        return self.chosen

    def in_host(self, tokens: int) -> int:
        """Bytes that such a batch leaves on the host, by the choices as they are."""
        away = [choice for choice in self.chosen if choice in AWAY]
        host = self._sizes().host if away else {}  # once: it looks at every layer
        return sum(tokens * host[choice] for choice in away)

    def watch(self, output: Tensor) -> None:
        """Notice when backward has come to the first layer's output, and what it took when it is over."""
        measured = self._measured
        if measured is not None and measured.beside is None and not measured.went_back and output.requires_grad:

            def note(gradient: Tensor) -> None:
                measured.went_back = True
                engine: Any = torch.autograd.Variable._execution_engine  # at once: a loop may reset the highest use
                engine.queue_callback(functools.partial(self._look, gradient.device))

            output.register_hook(note)

    def override(self) -> None:
        """Say once that a trainer's checkpointing is left out."""
        if not self._told:
            self._told = True
            warnings.warn(
                "the fast layers choose themselves what is computed again (here: "
                f"{in_words(self.chosen)}), so the trainer's gradient_checkpointing is left out; "
                "ft_core.fast.fast_path_of(model).choose('recompute') recomputes every layer",
                stacklevel=2,
            )

    def _held_by_host(self, tokens: int, host: Callable[[int], int]) -> list[Choice]:
        """What was wished for, with less in host memory where it could not hold all."""
        wanted = self._wished
        sizes = self._sizes()
        count = sum(tokens * sizes.host.get(choice, 0) for choice in wanted)
        if host(count) < count:
            return ["offload-input" if choice == "offload" else choice for choice in wanted]
        self._held = tokens
        return wanted

    def _set_head(self, room: int) -> None:
        self.head = min(self._most_head, max(int(room * HEAD_SHARE), HEAD_LEAST))

    def _auto(
        self,
        tokens: int,
        device: torch.device,
        host: Callable[[int], int],
        logits: int,
        disk: Callable[[], int],
    ) -> list[Choice]:
        known = self._plans.get(_rounded(tokens))
        if known is not None and torch.cuda.memory_allocated(device) <= known[0] + SLACK:
            return known[1]
        self._look(device)
        sizes, measured = self._sizes(), self._measured  # looking at the layers makes room beside their weights
        used, limit = torch.cuda.memory_allocated(device), _limit(device, self.cap)
        in_host = host(self._layers * tokens * sizes.host["offload"])
        if measured is not None and measured.beside is not None and tokens <= measured.tokens:
            kept = sum(sizes.kept[choice] for choice in measured.choices) * measured.tokens
            # The peak was that of the leanest choice: what it kept may be kept in other ways.
            room = limit - used - measured.beside + kept
            plan = fit_on_disk(self._layers, _rounded(tokens), room, sizes, in_host, disk, room)
            self._plans[_rounded(tokens)] = used, plan
            return plan
        if measured is not None and measured.beside is None and not measured.went_back and tokens == measured.tokens:
            return measured.choices
        sure = None if self.tight else self._sure(tokens, sizes, limit - used, logits)
        if sure == "keep":
            self._fits, self._fitted_beside = tokens, used
            return ["keep"] * self._layers
        likely = limit - used - counted(tokens, sizes, self._trained(), self.head) - LOGITS * logits
        self.tiles = self.tiles or (tokens > TILE and likely < 0)
        choices: list[Choice]
        if sure is not None:
            choices = [sure] * self._layers
        elif in_host >= self._layers * tokens * sizes.host["offload"]:
            choices = ["offload"] * self._layers
        else:
            choices = fit_on_disk(self._layers, tokens, 0, sizes, in_host, disk, likely)
        self._measured = _Measured(tokens, choices, used, torch.cuda.max_memory_allocated(device), LOGITS * logits)
        return choices

    def _fits_again(self, tokens: int, device: torch.device) -> bool:
        """Whether a batch is no longer than one that was found to fit, beside as much as there was then."""
        if tokens > self._fits or not self.varies or device.type != "cuda":
            return tokens <= self._fits
        return torch.cuda.memory_allocated(device) <= self._fitted_beside + SLACK

    def _sure(self, tokens: int, sizes: Sizes, free: int, logits: int) -> Choice | None:
        """What all layers can keep without a measurement, None if even that is in doubt."""
        beside = counted(tokens, sizes, self._trained(), self.head) + LOGITS * logits
        for choice in LEFT_HERE:
            if sizes.kept[choice] * self._layers * tokens + beside <= COUNTED * free:
                return choice
        return None

    def _look(self, device: torch.device) -> None:
        """Take the measure of a batch whose backward is over."""
        measured = self._measured
        if measured is None or measured.beside is not None or not measured.went_back:
            return
        peak = torch.cuda.max_memory_allocated(device)
        measured.beside = peak - measured.before
        if peak <= measured.peak:  # the highest use was before, perhaps much higher: while loading, say
            sizes = self._sizes()
            kept = sum(sizes.kept[choice] for choice in measured.choices) * measured.tokens
            likely = 1.25 * (counted(measured.tokens, sizes, self._trained(), self.head) + kept) + measured.logits
            measured.beside = min(measured.beside, int(likely))


def _rounded(tokens: int) -> int:
    """Up, by at most a sixteenth, so that batches of nearly the same length share a plan."""
    step = 1 << max(tokens.bit_length() - 5, 0)
    return -(-tokens // step) * step


def _limit(device: torch.device, cap: int | None) -> int:
    """Bytes that torch's allocated memory may reach."""
    free, total = torch.cuda.mem_get_info(device)
    limit = free + torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if share is not None:
        limit = min(limit, int(share(device) * total))
    return int((limit if cap is None else min(limit, cap)) * (1 - MARGIN))
