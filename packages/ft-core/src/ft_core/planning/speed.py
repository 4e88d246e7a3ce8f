"""The time of a step, from the operations and bytes that it takes and the rates that a card sustains.

Four sums, one after the other on the GPU: matrix products (each of a layer's twice, for the output and for the input's
gradient, and what is computed again), attention, passes over memory, expansions of quantized weights. Copies to and
from the host run beside them, and count where they take longer. Beside them, too, the host launches all of it: where it
takes about as long, now one waits and now the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from ft_core.fast.again import Choice
from ft_core.fast.graphs import BEHIND
from ft_core.fast.spill import RATE
from ft_core.planning.blueprint import Blueprint, Outline
from ft_core.planning.cards import Card
from ft_core.planning.peak import Layer, Peak, Step
from ft_core.planning.weights import States, states_of

__all__ = ["Times", "times_of"]

ATTENTION, SHORT = 0.605, 1600
"""cuDNN's attention on Hopper: this share of the products' peak for long sequences, half of it at so many tokens (from
335 TFLOP/s at 2048 tokens and 500 at 8192, forward and backward)."""
SOFTMAX = 55
"""What a score costs beside its products, in numbers of a head's width: heads of 64 reach 0.77 of the rate of 128 at
the same lengths (``ft_kernels.bench --models 1b,8b --ops attention``: 0.755 of documents of 512 tokens, 0.79 of mixed
ones)."""
PASSES, EXPAND = 0.71, 0.76
"""Shares of a memory's bandwidth that element-wise kernels and expansions of NF4 sustain."""
LAUNCH = 4e-3
"""Seconds of gaps between a step's kernels, where a step of 32 layers is recorded."""
HOST = {"none": 6.9e-3, "nf4": 8.6e-3, "int8": 8.3e-3}
"""Seconds in which the host launches one layer's kernels, forward and backward, where no step is recorded, by the kind
of its weights (``benchmarks/host_time.py``, steps of 20 layers beside an H200, without ``BESIDE``)."""
AGAIN: dict[Choice, float] = {"inputs": 1.5e-3, "offload": 2.1e-3, "recompute": 4.1e-3, "offload-input": 4.5e-3}
"""Seconds more of a layer that is partly or wholly computed again, and ``AGAIN_QUANTIZED`` times that with weights to
be expanded again (measured: recompute 4.0 ms in 16 bits, 7.0 from nf4; offload 2.0 and 3.1)."""
AGAIN_QUANTIZED = 1.6
LENDING = 2e-4
"""Seconds in which the host lends a layer its weights, forwards and backwards: two copies, four events."""
BESIDE, HEAD = 8e-3, 4e-3
"""Seconds of a step that the host takes for the trainer's own work and, where no step is recorded, for the head and its
loss: together 4 to 18 ms, from steps of 4, 8 and 20 layers on several machines."""
BOTH = 6
"""Where the GPU takes x seconds and the host y, a step takes the sum of both to this power, and its root: one of them
where it is longer by half, a tenth more than either where they are equal."""
REPLAY = 1e-3
"""The same of a layer where steps are recorded: what was recorded is looked over, and each gradient handed on (with
``BESIDE`` 41 to 47 ms of 30 layers, whatever their tokens, beside an H200)."""
LAUNCHES = "the host's launches"
"""The part of a step in which the GPU waits for them."""
UPDATE = 6e-6
"""Seconds of one tensor's update, its launch."""
PLAIN = 1.75
"""transformers' own layers take this many times what products, attention and passes would (566 ms where these take 336,
bf16 2 x 2048 on an H200)."""


@dataclass(frozen=True)
class Times:
    """Seconds: of a micro-batch by part (``parts``), and of the ``update`` after ``accumulation`` of them.

    Attributes:
        replayed: whether its kernels are recorded and launched at once, since the host would take longer than the GPU.
    """

    parts: dict[str, float]
    update: float
    accumulation: int
    tokens: int
    replayed: bool = False

    @property
    def batch(self) -> float:
        """Seconds of a micro-batch."""
        return sum(self.parts.values())

    @property
    def step(self) -> float:
        """Seconds from one update to the next."""
        return self.accumulation * self.batch + self.update

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens * self.accumulation / self.step


def times_of(
    blueprint: Blueprint, outline: Outline, step: Step, peak: Peak, card: Card, accumulation: int, recorded: bool
) -> Times | None:
    """A step's time on a card; None for a card of whose speed nothing is known.

    Args:
        recorded: whether steps may be recorded as graphs: short documents, no bound on the memory.
    """
    if not card.peak:
        return None
    layer, layers, tokens = Layer.of(blueprint), blueprint.layers, step.tokens
    products, plain = card.peak * card.share, blueprint.layout is None
    backward = 2.0 if outline.full else 1.0
    again = sum(_again(choice, layer) for choice in peak.choices) / max(layers, 1)
    whole = sum(choice in ("recompute", "offload-input") for choice in peak.choices) / max(layers, 1)
    if plain:
        again = whole
    flops = 2.0 * tokens * blueprint.used_numbers * (1 + backward + again)
    if not outline.full:  # inputs are wider by a line of 64 numbers; A and B in forward, and twice in backward
        flops = flops * (1 + 64 / 4096) + 6.0 * tokens * sum(outline.trained)
    head = 2.0 * tokens * blueprint.head.count * (1 + backward)
    window = getattr(blueprint.text, "sliding_window", None) if getattr(blueprint.layout, "attention", None) else None
    seen = min(step.length, int(window)) if window and blueprint.layout.attention.window else step.length
    scores = 2.0 * tokens * seen * layer.queries * layers
    attention_rate = card.peak * card.share / 0.673 * ATTENTION * seen / (seen + SHORT)
    width = int(getattr(blueprint.layout, "head_dim", 0) or 128)
    attention_rate *= min(width / (width + SOFTMAX) * (128 + SOFTMAX) / 128, 1.0)
    if not step.dense:
        attention_rate *= 0.8  # FlashAttention-2 beside cuDNN's on the same products
    forward, back = _passes(layer)
    moved = 2.0 * tokens * layers * (forward * (1 + again) + back)
    parts = {
        "products": (flops + head) / products,
        "attention": scores * (3.5 + whole) / attention_rate,
        "memory passes": moved / (card.bandwidth * PASSES),
        "gaps": LAUNCH * layers / 32,
    }
    if step.front is not None:
        parts["vision tower"] = step.pieces(step.front.flops * step.front.passes) / products
    kind = blueprint.stored or step.quantization
    if kind != "none":
        each = 2.56 if kind == "nf4" else 3.0
        tiles = 2 + again
        parts["expansions"] = each * sum(m.count for m in blueprint.linears) * tiles / (card.bandwidth * EXPAND)
    if plain:
        parts = {name: seconds * PLAIN for name, seconds in parts.items()}
    parts |= _waits(peak, step, card, sum(parts.values()), layers)
    computed, launched = sum(parts.values()), _launches(peak, kind, plain)
    able = recorded and set(peak.choices) <= {"keep", "inputs"} and not plain
    if replayed := able and computed <= BEHIND * launched:
        launched = REPLAY * layers + BESIDE
    parts[LAUNCHES] = (computed**BOTH + launched**BOTH) ** (1 / BOTH) - computed
    states: States = states_of(outline.all, step.optimizer)
    update = states.moved / (card.bandwidth * PASSES) + UPDATE * len(outline.all)
    update += 2 * states.host / card.link if states.host else 0.0
    return Times(parts, update, accumulation, tokens, replayed)


def _launches(peak: Peak, kind: str, plain: bool) -> float:
    """Seconds in which the host launches a step kernel by kernel."""
    each = AGAIN_QUANTIZED if kind != "none" else 1.0
    again = 0.0 if plain else sum(each * AGAIN.get(choice, 0.0) for choice in peak.choices)
    lending = LENDING * len(peak.choices) if peak.lent else 0.0
    return HOST.get(kind, HOST["nf4"]) * len(peak.choices) + again + lending + BESIDE + HEAD


def _again(choice: Choice, layer: Layer) -> float:
    """The share of a layer's products that is computed again."""
    h, i, q, k = layer.hidden, layer.inner, layer.queries, layer.keys
    whole = h * (q + 2 * k) + q * h + 3 * h * i
    if choice == "keep":
        return 0.0
    if choice in ("inputs", "offload"):
        return (h * (q + 2 * k) + 2 * h * i) / whole
    return 1.0 - h * i / whole


def _passes(layer: Layer) -> tuple[int, int]:
    """Numbers that a token's way through a layer reads and writes beside the products, forward and backward.

    Forward: both norms, the rotation, the activation, the low-rank product before o. Backward: the activation's pass,
    both norms with the residual, the rotation, and what the adapters' gradients read.
    """
    h, i, q, k = layer.hidden, layer.inner, layer.queries, layer.keys
    turned = 2 * (q + k)
    return 4 * h + turned + 3 * i + q, 5 * i + 8 * h + turned + (2 * h + q) + (q + 2 * k + 2 * h + 2 * i)


def _waits(peak: Peak, step: Step, card: Card, computing: float, layers: int) -> dict[str, float]:
    """Seconds by which copies to the host, or back from it, take longer than the layers that they run beside.

    Lent weights come once forwards and once backwards, beside what was offloaded.
    """
    if not peak.host + peak.disk + peak.lent:
        return {}
    away = sum(choice in ("offload", "offload-input") for choice in peak.choices)
    share = 1.0 if peak.lent else away / layers
    copy, weights = peak.host / card.link, peak.lent / card.link
    forward, back = computing * share * 0.3, computing * share * 0.7
    excess = max(copy - forward, weights - forward, 0.0) + max(copy + weights - back, 0.0)
    excess += 2 * peak.disk / RATE  # what is not pinned is copied while the host waits, and nothing runs beside it
    return {"copies": excess} if excess else {}
