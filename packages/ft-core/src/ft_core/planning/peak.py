"""The peak of a step's memory, followed from its phases: the last layer, the head, each layer backwards, the update.

What a layer keeps is counted as training itself counts it (``ft_core.fast.choose.Sizes``); what computing it backwards
takes beside that follows the allocations of ``ft_kernels``' blocks (``benchmarks/NOTES.md``, "What layers keep").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ft_core.fast.again import Choice
from ft_core.fast.choose import HEAD, HEAD_LEAST, HEAD_SHARE, LOGITS, TILE, Sizes, fit_on_disk
from ft_core.planning.blueprint import Blueprint, Outline
from ft_core.planning.front import Front
from ft_core.planning.load import ROW, Load
from ft_core.planning.weights import Lent, lent_bytes, room_bytes, states_of, weight_bytes
from ft_kernels.ops.linear_head.plan import Needs, Shape, held_dtype, plan_rows, row_stride

__all__ = ["ALONE", "TILE", "Layer", "Peak", "Step", "peak_of"]

ALONE: tuple[Choice, ...] = ("offload", "offload-input", "recompute")
"""The leanest choices of a layer, the fastest first."""

WORKSPACE = 2**25
"""Bytes that cuBLAS takes for its products."""
UNDER_WAY = 2
"""Tensors that are on their way to the host, or from it before a layer wants them (``ft_core.fast.offload``)."""


@dataclass(frozen=True)
class Step:
    """A step to be planned.

    Attributes:
        rows, length: of a micro-batch; ``tokens`` of it together.
        quantization: of the weights: ``none``, ``nf4`` or ``int8``. optimizer: as the configuration calls it.
        accumulates: whether gradients wait from one micro-batch to the next.
        wanted: the configuration's ``activations``.
        limit: bytes that torch may have; None for no limit. host: bytes of pinned host memory that can be had.
        tile: tokens of a sequence tile, or None.
        disk: bytes on the disk that can be had where that is not enough.
        load: what the method makes of a micro-batch; ``rows`` are its sequences already.
        dense: whether attention is cuDNN's (Hopper and later), for times.
        held: bytes of what stays in memory beside the model, by part.
        front: what stands before the layers, None for a model of text.
        lends: whether frozen weights live in the host's memory.
    """

    rows: int
    length: int
    quantization: str
    optimizer: str
    accumulates: bool = False
    wanted: str = "auto"
    limit: int | None = None
    host: int = 2**62
    disk: int = 0
    tile: int | None = None
    load: Load = ROW
    dense: bool = True
    held: Mapping[str, int] = field(default_factory=dict)
    front: Front | None = None
    lends: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        return self.rows * self.length

    def pieces(self, each: float) -> int:
        """Bytes of what stands before the layers, of so many a token of it."""
        return 0 if self.front is None else int(self.tokens * self.front.share * each)


@dataclass(frozen=True)
class Peak:
    """Bytes by part, at the moment when they are the most together.

    Attributes:
        parts: on the GPU, as torch counts them; their sum is ``total``. host: pinned host memory. paged: the
            optimizer's state that the system moves between host and GPU.
        choices: of the layers, first layer first. head_rows: of logits at a time. moment: ``forward`` (of the last
            layer), ``head``, ``layer``, ``update``, ``reference``, ``rollout``, or ``tower`` (before the layers).
            exact: whether the family is known and only an adapter is trained, which is what was measured.
        tile: tokens of a sequence tile. refused: the host cannot hold what is to be offloaded.
        optimizer: as transformers calls it. disk: bytes that the host's memory cannot hold. lent: of weights that live
            in the host's memory.
        tower_again: whether the layers of a tower, before the model's own, are computed again.
    """

    parts: dict[str, int]
    host: int
    paged: int
    choices: list[Choice]
    head_rows: int
    moment: str
    exact: bool
    tile: int | None = None
    refused: bool = False
    optimizer: str = "adamw_8bit"
    disk: int = 0
    tower_again: bool = False
    lent: int = 0

    @property
    def step(self) -> int:
        """Bytes of that which come and go with each step."""
        return sum(self.parts.get(name, 0) for name in PASSING)

    @property
    def total(self) -> int:
        """Bytes of the GPU's memory, without what CUDA itself takes."""
        return sum(self.parts.values())


PASSING = ("batch", "gradients", "activations kept", "head", "one layer", "update", "reference", "rollout", "tower")
"""Parts of a peak that come and go with each step."""
WORK = {"forward": "one layer", "layer": "one layer"}
"""What is worked with at a moment, where it is not called as the moment is."""


@dataclass(frozen=True)
class Layer:
    """Widths of a decoder layer in numbers: of its input, its perceptron, its queries, and its keys."""

    hidden: int
    inner: int
    queries: int
    keys: int

    @classmethod
    def of(cls, blueprint: Blueprint) -> Layer:
        """Of a model; guessed from the usual names where the family is not known."""
        text, layout = blueprint.text, blueprint.layout
        hidden = int(text.hidden_size)
        if layout is not None:
            return cls(
                hidden, int(text.intermediate_size), layout.heads * layout.head_dim, layout.kv_heads * layout.head_dim
            )
        heads = int(getattr(text, "num_attention_heads", 0) or 1)
        width = int(getattr(text, "head_dim", 0) or hidden // heads)
        groups = int(getattr(text, "num_key_value_heads", 0) or heads)
        return cls(hidden, int(getattr(text, "intermediate_size", 0) or 4 * hidden), heads * width, groups * width)


def peak_of(blueprint: Blueprint, outline: Outline, step: Step) -> Peak:
    """The peak of a step, its layers' choices made as training makes them; the least there is where none fits."""
    peak = _peak(blueprint, outline, step)
    if step.wanted != "auto" or step.limit is None or peak.total <= step.limit or blueprint.layout is None:
        return peak
    others = [_peak(blueprint, outline, replace(step, wanted=choice)) for choice in ALONE]
    return min([peak, *others], key=lambda one: (one.refused, one.total))


def _peak(blueprint: Blueprint, outline: Outline, step: Step) -> Peak:
    itemsize = 4 if outline.full else 2
    counts = [*outline.trained] * step.load.adapters
    states, trained = states_of([*counts, *outline.whole], step.optimizer), sum(counts)
    tokens, front = step.tokens, step.front or Front()
    whole = front.itemsize * sum(outline.whole)
    fixed = {
        "weights": weight_bytes(blueprint, step.quantization, itemsize),
        "room for updates": room_bytes(blueprint, outline) if step.quantization == "none" else 0,
        "adapters": 0 if outline.full else 4 * trained,
        "trained whole": whole,
        "optimizer": states.gpu,
        "workspace": WORKSPACE,
    }
    if outline.full:  # autocast keeps a 16-bit copy of each product's weight from forward to backward
        fixed["16-bit copies"] = 2 * sum(m.count for m in (*blueprint.inner, blueprint.head)) + front.copies
    elif outline.whole:
        fixed["16-bit copies"] = front.copies
    if not outline.full and blueprint.stored is not None:
        fixed["weights"] = weight_bytes(blueprint, blueprint.stored, itemsize)
    lent = lent_bytes(blueprint, outline, blueprint.stored or step.quantization) if step.lends else Lent()
    if lent.whole and step.quantization == "none" and blueprint.stored is None:
        fixed["weights"] += fixed.pop("room for updates")  # they are one, and come and go as one
    fixed["weights"] -= lent.whole
    fixed |= step.held
    width = int(getattr(blueprint.layout, "head_dim", 0) or 128)
    fixed["batch"] = tokens * (3 * 8 + 4 * width)  # ids, labels and the labels moved by one; cos and sin
    if step.front is not None:
        fixed["batch"] += tokens * 5 * 8  # four positions of a token, and what kind it is
        fixed["images"] = step.pieces(front.inputs)
    before, features = step.pieces(front.kept), step.pieces(front.features)
    if lent.whole:
        fixed["weights under way"] = 2 * lent.layer
    used = sum(fixed.values())
    layer = Layer.of(blueprint)
    sizes = _sizes(blueprint, outline, layer)
    beside = _beside(blueprint, outline, step, layer)
    head, rows = _head(blueprint, outline, step, layer, used + before + lent.head)
    head += lent.head
    gradients = 4 * trained + whole
    if blueprint.layout is None:
        choices: list[Choice] = ["keep" if step.wanted == "keep" else "recompute"] * blueprint.layers
        refused = False
    else:
        choices, refused = _choices(
            blueprint, step, layer, sizes, beside, used + before + features, head, gradients, lent.head
        )  # fmt: skip
    kept = [tokens * sizes.kept[choice] for choice in choices]
    moments = _moments(kept, [beside[choice] for choice in choices], head, gradients, step.accumulates)
    for name, (waits, sums, work) in moments.items():  # the tower's own backward comes last
        moments[name] = (waits + before + (features if name == "head" else 0), sums, work)
    if step.front is not None:
        moments["tower"] = (before, gradients if before or step.accumulates else 0, step.pieces(front.work))
    moments["update"] = (0, gradients, states.step)
    if outline.able and blueprint.layout is not None:
        ahead = _forward(blueprint, step, layer, choices) + lent.head
        moments["forward"] = (sum(kept) + before + features, gradients if step.accumulates else 0, ahead)
    if step.load.reference:  # the gradient that the head has made waits beside the activations
        waiting = sum(kept) + before + 2 * layer.hidden * tokens
        moments["reference"] = (waiting, moments["head"][1], _without_gradients(blueprint, step, layer, head))
    if step.load.written:
        moments["rollout"] = (0, 0, _written(blueprint, step))
    name = max(moments, key=lambda moment: sum(moments[moment]))
    waits, sums, work = moments[name]
    parts = fixed | {
        "gradients": sums,
        "activations kept": waits,
        WORK.get(name, name): work,
    }
    moved = tokens * sum(sizes.host.get(choice, 0) for choice in choices)
    return Peak(
        parts={part: size for part, size in parts.items() if size},
        host=moved if refused else min(moved, step.host),
        paged=states.host,
        choices=choices,
        head_rows=rows,
        moment=name,
        exact=blueprint.layout is not None and outline.able,
        tile=step.tile,
        refused=refused,
        optimizer=step.optimizer,
        disk=0 if refused else max(moved - step.host, 0),
        tower_again=front.recomputed,
        lent=lent.whole,
    )


def _moments(
    kept: Sequence[int], beside: Sequence[int], head: int, gradients: int, accumulates: bool
) -> dict[str, tuple[int, int, int]]:
    """What waits, the gradients, and what is worked with: at the head, and at the worst layer backwards."""
    count, whole = len(kept), sum(kept)
    moments = {"head": (whole, gradients if accumulates else 0, head)}
    worst, waits = (0, 0, 0), whole
    for index in reversed(range(count)):
        made = gradients if accumulates else gradients * (count - index) // count
        worst = max(worst, (waits, made, beside[index]), key=sum)
        waits -= kept[index]
    return moments | {"layer": worst}


def _choices(
    blueprint: Blueprint, step: Step, layer: Layer, sizes: Sizes, beside: dict[Choice, int], used: int, head: int,
    gradients: int, late: int,
) -> tuple[list[Choice], bool]:  # fmt: skip
    """As :class:`ft_core.fast.choose.Chooser` makes them once a batch is measured; whether the host is too small.

    ``late``: bytes of weights that come with the last layer.
    """
    layers, tokens = blueprint.layers, step.tokens
    if step.wanted != "auto":
        choice: Choice = step.wanted  # type: ignore[assignment]
        if choice == "offload" and layers * tokens * sizes.host["offload"] > step.host:
            choice = "offload-input"
        return [choice] * layers, layers * tokens * sizes.host.get(choice, 0) > step.host + step.disk
    if step.limit is None:
        return ["keep"] * layers, False
    first = gradients if step.accumulates else 0
    if used + max(layers * tokens * sizes.kept["keep"] + max(head, beside["keep"]) + first, gradients) <= step.limit:
        return ["keep"] * layers, False
    holds = step.host >= layers * tokens * sizes.host["offload"]
    lean: Choice = "offload" if holds else "offload-input"
    ahead = _forward(blueprint, step, layer, [lean]) + first + late
    room = step.limit - used - max(head + first, ahead, beside[lean] + gradients)
    return fit_on_disk(layers, tokens, room, sizes, step.host, lambda: step.disk, room), False


def _sizes(blueprint: Blueprint, outline: Outline, layer: Layer) -> Sizes:
    if blueprint.layout is not None:
        ranks = 7 * -(-outline.rank // 16) * 16
        sizes = Sizes.of(blueprint.layout, blueprint.text, outline.able, 2, ranks)
        if not outline.full:
            return sizes
        kept = {choice: size + (2 * layer.hidden if size else 0) for choice, size in sizes.kept.items()}
        return Sizes(kept, sizes.host, sizes.working)
    whole = 2 * (8 * layer.hidden + 3 * layer.queries + 4 * layer.keys + 4 * layer.inner)
    return Sizes({"keep": whole, "recompute": 2 * layer.hidden}, {}, whole)


def _beside(blueprint: Blueprint, outline: Outline, step: Step, layer: Layer) -> dict[Choice, int]:
    """Bytes that computing a layer backwards takes beside what waits, by choice.

    The perceptron's half comes first: the gradient from above, [gate | up], the gradient of their product, and in a
    layer that is computed again q, k, v, the attention's output and the half's input. Then the attention's: dq in fp32.
    """
    h, i, q, k = layer.hidden, layer.inner, layer.queries, layer.keys
    tokens = step.tokens
    down, both = _expanded(blueprint, step, layer)
    tiled = step.tile is not None and tokens > step.tile and outline.able
    ours = step.tile if tiled and step.tile is not None else tokens
    # q, k, v and their gradients, that of q in fp32 too; the output and its gradient; where heads share keys, their
    # own gradients of keys and values (8 GiB of 514112 tokens' 62 on an H200, by cuDNN); and the gradient from above.
    attention = 2 * (q + 2 * k) + 2 * q + 2 * q + (2 * q if k < q else 0) + h

    def work(before: int, around: int) -> int:
        """``before``: numbers a token that wait from the attention's half; ``around``: what waits anyhow."""
        if tiled:  # all three weights are expanded once for all tiles, and the gradient of the half's input is whole
            first = 3 * i * ours + down + both + (before + h) * tokens
        else:
            first = max(3 * i * tokens + down, (2 * i + h) * tokens + both) + before * tokens
        second = attention * tokens + (q + 2 * k + 2 * h) * (ours if tiled else 0)
        return 2 * (max(first, second) + around * tokens)

    again = 2 * q + 2 * k + h
    kept = 2 * ((i + 3 * h) * tokens + down)
    if not outline.able:
        single = (3 * i + 6 * h + q + 2 * k) * 2 * tokens + 2 * both
        whole = _sizes(blueprint, outline, layer).kept["keep"] * tokens
        return {
            "keep": single, "inputs": single + whole, "recompute": single + whole, "offload": single + whole,
            "offload-input": single + whole,
        }  # fmt: skip
    return {
        "keep": max(kept, 2 * (attention - 2 * q - 2 * k) * tokens),  # q, k, v and the output are kept
        "inputs": work(0, h),
        "offload": work(0, h + (UNDER_WAY + 1) * h),
        "recompute": work(again, h),
        "offload-input": work(again, h + (UNDER_WAY + 1) * h),
    }


def _forward(blueprint: Blueprint, step: Step, layer: Layer, choices: Sequence[Choice]) -> int:
    """Bytes that the last layer's forward pass takes beside what layers keep.

    That is [gate | up], their product, and down's weight. A layer that keeps all has counted [gate | up] already. What
    leaves for the host is still there: all that the last layer with something to hand over does, and what it came from.
    """
    tokens, last = step.tokens, choices[-1]
    down, both = _expanded(blueprint, step, layer)
    tiled = step.tile is not None and tokens > step.tile
    ours = step.tile if tiled and step.tile is not None else tokens
    work = (1 if last == "keep" else 3) * layer.inner * ours + down
    if tiled:  # all weights are expanded once for all tiles, whose outputs are one
        work += both + layer.hidden * tokens
    away = {"offload": 2 * layer.hidden + layer.queries, "offload-input": UNDER_WAY * layer.hidden}
    work += max(away.get(choice, 0) for choice in choices) * tokens
    if last not in ("keep", "inputs"):
        work += layer.hidden * tokens
    return 2 * work


def _expanded(blueprint: Blueprint, step: Step, layer: Layer) -> tuple[int, int]:
    """Numbers of the weights of down, and of gate and up, that are expanded for a product; none in 16 bits."""
    if step.quantization == "none" and blueprint.stored is None:
        return 0, 0
    return layer.hidden * layer.inner, 2 * layer.hidden * layer.inner


def _head(
    blueprint: Blueprint, outline: Outline, step: Step, layer: Layer, used: int
) -> tuple[int, int]:  # fmt: skip
    """Bytes that the head and its loss take, and the rows of logits that exist at a time."""
    tokens, vocabulary = step.tokens, blueprint.head.out
    states = 3 * layer.hidden * 2 * tokens  # what the last layer gave, its norm, and the gradient
    if blueprint.layout is None:
        return states + LOGITS * tokens * vocabulary, tokens
    room = HEAD if step.limit is None else max(step.limit - used, 0)
    most = min(HEAD, max(int(room * HEAD_SHARE), HEAD_LEAST))
    shape = Shape(tokens, layer.hidden, vocabulary, 0, torch.bfloat16, True)
    needs = Needs(hidden=True, weight=outline.full)
    rows = min(max(plan_rows(shape, needs, most), 1), tokens)
    held = tokens * layer.hidden * 4 if held_dtype(shape, most) != shape.dtype else 0
    work: Any = rows * (2 * row_stride(shape) + 4 * layer.hidden) + 48 * tokens + held
    return states + (most if outline.full else min(int(work), most)), rows


def _without_gradients(blueprint: Blueprint, step: Step, layer: Layer, head: int) -> int:
    """Bytes that a pass without gradients takes: of a layer, or of the head, whose states' gradient nobody wants."""
    tokens, (down, _) = step.tokens, _expanded(blueprint, step, layer)
    tiled = step.tile is not None and tokens > step.tile
    inner = step.tile if tiled and step.tile is not None else tokens
    one = 2 * (3 * layer.inner * inner + down + 3 * layer.hidden * tokens)
    return max(one, head - 2 * layer.hidden * tokens)


def _written(blueprint: Blueprint, step: Step) -> int:
    """Bytes that completions take while they are written: keys and values of all, and logits of a step in fp32."""
    layout = blueprint.layout
    rows = 1 << (step.load.written - 1).bit_length() if step.load.written <= 8 else -(-step.load.written // 8) * 8
    width = Layer.of(blueprint).keys
    cache = 2 * blueprint.layers * rows * step.length * width * 2
    return cache + rows * blueprint.head.out * (2 + 4 * 4) + (0 if layout is not None else cache)
