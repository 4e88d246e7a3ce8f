"""Puts the fast layers into a model, and takes them out again.

Nothing but the given instance changes: its layers, its last norm, its backbone and itself get a ``forward`` of their
own. Modules, parameters and their names stay, so that whatever saves, merges or trains the model sees what it saw
before. A call that the fast layers are not made for (with a key-value cache, say) is transformers' own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ft_core.data.collating import LENGTHS
from ft_core.fast.again import Choice, compute_by_choice, without_checkpointing
from ft_core.fast.blocks import Keep
from ft_core.fast.choose import TILE, Chooser, Sizes
from ft_core.fast.documents import BATCH, Batch, batch_of
from ft_core.fast.find import NotFast, layout_of, unwrapped
from ft_core.fast.forwards import Forward, has_other
from ft_core.fast.graphs import Graphs, Pace
from ft_core.fast.layer import DecoderLayer, norm
from ft_core.fast.layout import Layout, at
from ft_core.fast.lent import LentWeights
from ft_core.fast.linears import is_plain
from ft_core.fast.offload import HostMemory
from ft_core.fast.whole import BodyForward, ModelForward, takes

__all__ = ["FastPath", "disable", "enable", "fast_path_of"]

HANDLE = "_ft_fast_path"


@dataclass(eq=False)
class FastPath:
    """The fast layers of one model.

    Attributes:
        model: the model with its head, not an adapter's wrapping.
        layout: of its family.
        on: whether the fast layers are used; while they are not, every call is transformers' own.
        chooser: what each layer keeps between forward and backward (see :meth:`choose`).
        host: activations that wait in the host's memory. own_head: whether the pass under way never holds all logits.
        graphs: recorded steps, for batches of rows without padding (``graphs.on = False`` does without), and for rows
            of documents where the host is slower than the GPU (``graphs.documents = False`` does without these alone).
        pace: which of the two it is.
        told: what the backbone is to know of the batch under way, where it is called by what merges images and text.
        tile: how many tokens a layer computes at a time, attention aside, in batches of more; None for all, until
            ``auto`` needs tiles. They save memory for long sequences, and compute gate and up again in backward
            whatever the layer keeps (:func:`ft_kernels.mlp_block`), where layers' halves are one operation each.
        lent: weights that live in the host's memory (see :meth:`lend`).
    """

    model: Any
    layout: Layout
    on: bool = True
    graphs: Graphs = field(default_factory=Graphs)
    pace: Pace = field(default_factory=Pace)
    host: HostMemory = field(default_factory=HostMemory)
    tile: int | None = None
    chooser: Chooser = field(init=False)
    own_head: bool = False
    told: dict[str, Any] = field(default_factory=dict)
    lent: LentWeights | None = None
    _changed: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chooser = Chooser(self._sizes, len(self.layers), self._trained, self.layout.body is not None)

    @property
    def layers(self) -> list[nn.Module]:
        """The model's layers, in order."""
        return list(at(at(self.model, self.layout.backbone), self.layout.layers))

    @property
    def decoders(self) -> list[DecoderLayer]:
        """What computes each layer, in order."""
        forwards = [vars(layer).get("forward") for layer in self.layers]
        return [forward.fast for forward in forwards if isinstance(forward, _LayerForward)]

    def keep(self, what: Keep) -> None:
        """Choose what the halves of layers that keep what backward wants take that to be.

        See :func:`ft_kernels.attention_block`. It holds for the layers whose halves are one operation each.
        """
        for decoder in self.decoders:
            decoder.blocks.keep = what

    def choose(self, what: Literal["auto"] | Choice | Sequence[Choice] = "auto", *, memory: int | None = None) -> None:
        """Choose what each layer keeps between forward and backward, instead of a trainer's gradient_checkpointing.

        Args:
            what: ``keep``, ``inputs``, ``recompute``, ``offload`` or ``offload-input`` (see
                :data:`ft_core.fast.again.Choice`), one for all layers or one for each, first layer first; ``auto``
                chooses by itself, for each batch, what is fastest and fits. Where the host's memory cannot hold what
                ``offload`` takes there, it is ``offload-input``. Gradients are the same bit for bit with each, save for
                a head that is given less memory.
            memory: bytes that the GPU's allocated memory may reach; None for what is free. It binds ``auto`` and the
                head; a choice of yours stays as it is. It is a plan, not a limit that torch enforces.

        Raises:
            ValueError: no such choice, or not one for each layer.
        """
        self.chooser.want(what, memory)
        self.host.begin()

    def lend(self, layers: int | None = None, *, ends: bool = True) -> None:
        """Let frozen weights live in the host's memory, from where each layer's come while the one before computes.

        No step is recorded then. What is computed stays the same bit for bit; :meth:`undo` brings them back.

        Args:
            layers: how many layers lend theirs, the first ones first; None for all.
            ends: whether the embedding and the head do, too.

        Raises:
            RunError: the host's memory cannot hold them.
        """
        self.graphs.drop()
        for decoder in self.decoders:
            decoder.blocks.halves()  # what 16-bit weights need beside them is made while they are here
        try:
            self.lent = LentWeights(self, layers, ends=ends)
        finally:
            for decoder in self.decoders:
                decoder.blocks.forget()  # some weights lie elsewhere now

    @contextlib.contextmanager
    def choosing(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Within it the layers compute a batch that is to be differentiated, each by its choice."""
        from ft_core.fast.decoding import rest

        rest(self.model)  # training may want the memory that was kept for more answers

        def room(wanted: int) -> int:
            return min(wanted, self.host.pool(device).room)

        layers = self.layers
        flagged = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
        logits = 0 if self.own_head else tokens * self.model.config.get_text_config().vocab_size
        choices = self.chooser.begin(tokens, device, room, logits, self.host.disk_room)
        if self.tile is None and self.chooser.tiles:
            self.tile = TILE
        if moved := self.chooser.in_host(tokens):
            self.host.beyond = moved - self.host.pool(device).room
        for layer, choice in zip(layers, choices, strict=True):
            forward = vars(layer).get("forward")
            if isinstance(forward, _LayerForward):
                forward.fast.choice = choice
        if flagged:
            self.chooser.override()
        self.host.begin()
        try:
            with without_checkpointing(flagged):
                yield
        finally:
            self.host.settle()

    def _sizes(self) -> Sizes:
        able = all(decoder.blocks.able for decoder in self.decoders)
        return Sizes.of(self.layout, self.model.config.get_text_config(), able, self.model.dtype.itemsize)

    def _trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def put(self, forward: Forward) -> None:
        """Give an instance another forward."""
        forward.module.forward = forward  # type: ignore[assignment]
        self._changed.append(forward.module)

    def undo(self) -> None:
        """Give every instance its own forward back.

        One that somebody has wrapped since (TRL's trainers wrap the model's) stays, and does nothing any more.
        """
        self.on = False
        if self.lent is not None:
            self.lent.end()
            self.lent = None
        for decoder in self.decoders:
            decoder.blocks.undo()
        for module in self._changed:
            forward = vars(module).get("forward")
            if isinstance(forward, Forward) and forward.path is self:
                del module.forward
        self._changed.clear()
        vars(self.model).pop(HANDLE, None)


def fast_path_of(model: Any) -> FastPath | None:
    """The fast path of a model, or of what wraps it; None where there is none."""
    path: FastPath | None = vars(unwrapped(model)).get(HANDLE)
    return path


def disable(model: Any) -> None:
    """Let a model compute as transformers made it; nothing happens to one that does."""
    path = fast_path_of(model)
    if path is not None:
        path.undo()


def enable(model: Any) -> FastPath:
    """Let a model compute with the fast layers; one that does already is left as it is.

    Args:
        model: a transformers model with any head, with or without PEFT's wrapping.

    Returns:
        A handle that can switch them off for a while (``on``) or take them out (``undo``).

    Raises:
        NotFast: the family is unknown, or this instance differs from what the family's layout says.
    """
    model = unwrapped(model)
    if (known := fast_path_of(model)) is not None:
        return known
    layout = layout_of(model)
    backbone = at(model, layout.backbone)
    layers = list(at(backbone, layout.layers))
    body = at(model, layout.outer)
    for part in (body, backbone, *layers):
        if has_other(part):
            raise NotFast(f"something else has replaced the forward of its {type(part).__name__}")
    path = FastPath(model, layout)
    for layer in layers:
        path.put(_LayerForward(path, layer, DecoderLayer(layer, layout)))
    path.put(_NormForward(path, at(backbone, layout.norm)))
    path.put(_BackboneForward(path, backbone))
    if body is not backbone:
        path.put(BodyForward(path, body))
    if isinstance(getattr(model, layout.head, None), nn.Module) and not has_other(model):
        path.put(ModelForward(path, model, body))
    vars(model)[HANDLE] = path
    return path


class _LayerForward(Forward):
    def __init__(self, path: FastPath, module: nn.Module, fast: DecoderLayer) -> None:
        super().__init__(path, module)
        self.fast = fast

    def __call__(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        lent = self.path.lent
        if lent is None:
            return self._computed(hidden_states, *args, **keywords)
        lent.come(self.module)
        out = self._computed(hidden_states, *args, **keywords)
        lent.done(self.module, out)
        return out

    def _computed(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        batch: Batch | None = keywords.pop(BATCH, None)
        if batch is None:
            return self.own(hidden_states, *args, **keywords)
        plain, choice = all(is_plain(child) for child in self.module.children()), self.fast.choice
        compute: Callable[..., Tensor]
        if plain:
            cos, sin = keywords["position_embeddings"]
            compute = functools.partial(self.fast, cos=cos, sin=sin, batch=batch, tile=self.path.tile)
        else:
            # Somebody listens to a part of this layer: it has to be called.
            keywords["attention_mask"] = batch.pairs(hidden_states, self.fast.window)
            compute = functools.partial(self._by_itself, args, keywords)
        if choice == "keep" or not torch.is_grad_enabled():
            return compute(hidden_states)
        able = plain and self.fast.blocks.takes(hidden_states)
        out = compute_by_choice(choice, compute, hidden_states, able, self._trained, self.path.host)
        if self.module is self.path.layers[0]:
            self.path.chooser.watch(out)
        return out

    def _trained(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _by_itself(self, args: Any, keywords: dict[str, Any], x: Tensor, **ignored: Any) -> Any:
        with without_checkpointing([self.module] if getattr(self.module, "gradient_checkpointing", False) else []):
            return self.own(x, *args, **keywords)


class _NormForward(Forward):
    def __call__(self, hidden_states: Tensor) -> Any:
        return norm(self.module, self.path.layout, hidden_states) if self.path.on else self.own(hidden_states)


class _BackboneForward(Forward):
    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **keywords: Any,
    ) -> Any:
        tokens = input_ids if input_ids is not None else inputs_embeds
        keywords = {**self.path.told, **keywords}
        lengths = keywords.pop(LENGTHS, None)
        choosing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        batch = keywords.pop(BATCH, None)
        if tokens is not None and takes(self.path, past_key_values, use_cache):
            if batch is None and not keywords.get("output_attentions"):
                shape = (tokens.shape[0], tokens.shape[1])
                batch = batch_of(shape, attention_mask, position_ids, lengths, keywords)
            use_cache = False
            if batch is not None:
                # A mask with four dimensions is handed on as it is: none is made, and the layers have the documents.
                attention_mask = tokens.new_empty((1, 1, 0, 0), dtype=torch.bool)
                keywords[BATCH] = batch
            if batch is not None and torch.is_grad_enabled():
                choosing = self.path.choosing(batch.counted(tokens.shape[0] * tokens.shape[1]), tokens.device)
        with choosing:
            return self.own(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **keywords,
            )
