"""Which models answer by the fast layers: those of which nothing but the parts that a layout names is computed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ft_core.fast.find import NotFast, layout_of, unwrapped
from ft_core.fast.forwards import has_other
from ft_core.fast.layout import Layout, at
from ft_core.fast.linears import LENT

__all__ = ["able"]

ROTATIONS = ("default", "linear", "llama3", "yarn")
"""transformers' rotary embeddings whose angles depend on nothing but the position; the others change as texts grow."""

HARMLESS = ("make_inputs_require_grads",)
"""Hooks that compute nothing: transformers' enable_input_require_grads asks for a gradient."""


def able(model: Any) -> Layout:
    """The layout of a model, with or without PEFT's wrapping.

    Raises:
        NotFast: the family is unknown, or this instance computes more than its layers do.
    """
    plain = unwrapped(model)
    layout = layout_of(plain)
    if not layout.plain:
        raise NotFast("its family's layout does not say that its layers are all that it computes (Layout.plain)")
    if any(hasattr(parameter, LENT) for parameter in plain.parameters()):
        raise NotFast("its weights live in the host's memory")
    form, attention = layout.norms, layout.attention
    if form.after_attention or form.after_mlp or layout.residual_scale != 1.0 or attention.softcap:
        raise NotFast("its layers have norms after a branch, a scaled residual or a bound on the scores")
    if layout.logit_softcap is not None or layout.logit_scale != 1.0:
        raise NotFast("its logits are bounded or scaled")
    backbone = at(plain, layout.backbone)
    kind = getattr(at(backbone, layout.rotary), "rope_type", "unknown")
    if kind not in ROTATIONS:
        raise NotFast(f"its rotary embedding ({kind}) changes with the length of the text")
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise NotFast("its adapter is a learned prompt")
    embedding = plain.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise NotFast(f"its embedding is a {type(embedding).__name__}")
    if not embedding.weight.is_floating_point() or embedding.weight.dtype == torch.float64:
        raise NotFast(f"its embedding is {embedding.weight.dtype}")
    if not isinstance(getattr(plain, layout.head, None), nn.Module):
        raise NotFast("it has no language-model head")
    for name, module in chain(model.named_modules(), plain.named_modules()):
        own = vars(module)
        hooks = chain(own["_forward_hooks"].values(), own["_forward_pre_hooks"].values())
        if any(getattr(hook, "__name__", "") not in HARMLESS for hook in hooks):
            raise NotFast(f"{name or 'the model'} has a hook")
        if has_other(module):
            raise NotFast(f"the forward of {name or 'the model'} is somebody else's")
    return layout
