"""Puts the fast layers into a model, and takes them out again.

Nothing but the given instance changes: its layers, its last norm, its backbone and itself get a ``forward`` of their
own. Modules, parameters and their names stay, so that whatever saves, merges or trains the model sees what it saw
before. A call that the fast layers are not made for (with a key-value cache, say) is transformers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ft_core.fast.documents import Batch, batch_of
from ft_core.fast.find import NotFast, layout_of
from ft_core.fast.head import can_fuse, loss_of
from ft_core.fast.layer import DecoderLayer, at, norm
from ft_core.fast.layout import Layout
from ft_core.fast.linears import is_plain

__all__ = ["FastPath", "disable", "enable", "fast_path_of"]

BATCH = "ft_batch"
"""The keyword by which the backbone hands the batch's documents to its layers."""
HANDLE = "_ft_fast_path"
OURS = "ft_fast_path"

Forward = Callable[..., Any]


@dataclass(eq=False)
class FastPath:
    """The fast layers of one model.

    Attributes:
        model: the model with its head, not an adapter's wrapping.
        layout: of its family.
        on: whether the fast layers are used; while they are not, every call is transformers' own.
    """

    model: Any
    layout: Layout
    on: bool = True
    _changed: list[nn.Module] = field(default_factory=list)

    def replace(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        """Give an instance another forward, made from its own."""
        own = module.forward
        module.forward = functools.wraps(own)(make(own))
        vars(module.forward)[OURS] = self
        self._changed.append(module)

    def undo(self) -> None:
        """Give every instance its own forward back.

        One that somebody has wrapped since (TRL's trainers wrap the model's) stays, and does nothing any more.
        """
        self.on = False
        for module in self._changed:
            if vars(vars(module).get("forward", object)).get(OURS) is self:
                del module.forward
        self._changed.clear()
        vars(self.model).pop(HANDLE, None)


def _unwrapped(model: Any) -> Any:
    """The transformers model that PEFT, DDP or torch.compile may have wrapped."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def fast_path_of(model: Any) -> FastPath | None:
    """The fast path of a model, or of what wraps it; None where there is none."""
    path: FastPath | None = vars(_unwrapped(model)).get(HANDLE)
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
    model = _unwrapped(model)
    if (known := fast_path_of(model)) is not None:
        return known
    layout = layout_of(model)
    backbone = at(model, layout.backbone)
    layers = list(at(backbone, layout.layers))
    for part in (backbone, *layers):
        if "forward" in vars(part):
            raise NotFast(f"something else has replaced the forward of its {type(part).__name__}")
    path = FastPath(model, layout)
    for layer in layers:
        path.replace(layer, functools.partial(_layer_forward, DecoderLayer(layer, layout)))
    last = at(backbone, layout.norm)
    path.replace(last, functools.partial(_norm_forward, path, last))
    path.replace(backbone, functools.partial(_backbone_forward, path))
    if isinstance(getattr(model, layout.head, None), nn.Module) and "forward" not in vars(model):
        path.replace(model, functools.partial(_model_forward, path, backbone))
    vars(model)[HANDLE] = path
    return path


def _layer_forward(fast: DecoderLayer, own: Forward) -> Forward:
    def forward(hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        batch: Batch | None = keywords.pop(BATCH, None)
        if batch is None:
            return own(hidden_states, *args, **keywords)
        if all(is_plain(child) for child in fast.module.children()):
            cos, sin = keywords["position_embeddings"]
            return fast(hidden_states, cos, sin, batch)
        # Somebody listens to a part of this layer: it has to be called.
        keywords["attention_mask"] = batch.pairs(hidden_states, fast.window)
        return own(hidden_states, *args, **keywords)

    return forward


def _norm_forward(path: FastPath, module: nn.Module, own: Forward) -> Forward:
    def forward(hidden_states: Tensor) -> Any:
        return norm(module, path.layout, hidden_states) if path.on else own(hidden_states)

    return forward


def _backbone_forward(path: FastPath, own: Forward) -> Forward:
    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **keywords: Any,
    ) -> Any:
        tokens = input_ids if input_ids is not None else inputs_embeds
        wants_cache = path.model.config.use_cache if use_cache is None else use_cache
        if path.on and tokens is not None and past_key_values is None and (path.model.training or not wants_cache):
            batch = None
            if not keywords.get("output_attentions"):
                batch = batch_of((tokens.shape[0], tokens.shape[1]), attention_mask, position_ids, keywords)
            use_cache = False
            if batch is not None:
                # A mask with four dimensions is handed on as it is: none is made, and the layers have the documents.
                attention_mask = tokens.new_empty((1, 1, 0, 0), dtype=torch.bool)
                keywords[BATCH] = batch
        return own(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **keywords,
        )

    return forward


def _model_forward(path: FastPath, backbone: Any, own: Forward) -> Forward:
    def forward(*args: Any, labels: Tensor | None = None, **keywords: Any) -> Any:
        head = getattr(path.model, path.layout.head)
        asked = args or keywords.get("logits_to_keep") or keywords.get("return_dict") is False
        if not path.on or not path.model.training or labels is None or asked or not can_fuse(head):
            return own(*args, labels=labels, **keywords)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        count, shifted = keywords.pop("num_items_in_batch", None), keywords.pop("shift_labels", None)
        for name in ("logits_to_keep", "return_dict"):
            keywords.pop(name, None)
        outputs = backbone(**keywords)
        known = labels if shifted is None else shifted
        loss = loss_of(head, path.layout, outputs.last_hidden_state, known, count, shifted=shifted is not None)
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states)

    return forward
