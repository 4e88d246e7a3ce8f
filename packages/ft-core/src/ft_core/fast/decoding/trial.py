"""Whether the fast layers write what transformers would, on this machine: tried on a few tokens before an answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ft_core.fast.check import bound
from ft_core.fast.decoding.layers import Layers
from ft_core.fast.decoding.session import Session
from ft_core.fast.swap import fast_path_of
from ft_core.memory import is_memory_error

__all__ = ["trial"]

TOKENS, PROMPTS = 18, ((12,), (12, 5))
"""Tokens of a text, and how many of them are the prompts: one text alone, and two of different lengths."""


@torch.inference_mode()
def trial(layers: Layers, model: Any) -> str | None:
    """What is wrong with the logits of the fast layers, in a few words; None where nothing is.

    Prompts are read, and given tokens follow: kernel by kernel at first, then as a recorded step. The logits' distance
    from those of transformers' own layers, relative L2, may be what rounding explains
    (:func:`ft_core.fast.check.bound`).

    Args:
        layers: of the model.
        model: the model, with PEFT's wrapping if there is one, in evaluation mode.
    """
    vocabulary = layers.embedding.shape[0]
    text = [(7 * i + 3) % vocabulary for i in range(TOKENS)]
    expected = _plain(model, torch.tensor([text], device=layers.device))
    terms = max(product.sizes[0] for layer in layers.layers for product in layer.products)
    # bitsandbytes rounds the inputs of its 8-bit layers to 8 bits, which is about what bf16 does to all of them.
    rounds = any(product.kind == "Int8Weight" for layer in layers.layers for product in layer.products)
    limit = bound(torch.bfloat16 if rounds else layers.dtype, len(layers.layers), terms)
    for prompts in PROMPTS:
        try:
            found = _written(layers, text, prompts)
        except Exception as error:
            if is_memory_error(error):
                raise
            return f"they fail on this machine ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
        for count, logits in zip(prompts, found, strict=True):
            target = expected[count - 1 :][: len(logits)]
            distance = float((logits - target).norm() / target.norm())
            if not distance <= limit:
                return f"their logits differ from transformers' own by {distance:.2g} (rounding explains {limit:.2g})"
    return None


def _plain(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[tokens, V]`` by transformers' layers."""
    path = fast_path_of(model)
    was_on = path is not None and path.on
    if path is not None:
        path.on = False
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        if path is not None:
            path.on = was_on
    return logits


def _written(layers: Layers, text: list[int], prompts: tuple[int, ...]) -> list[Tensor]:
    """For each prompt, logits ``[tokens, V]`` from its last token on: as many steps as the longest one leaves."""
    session = Session(layers, len(prompts), TOKENS)
    steps = TOKENS - max(prompts)
    logits = [session.begin([text[:count] for count in prompts]).float().clone()]
    for step in range(steps):
        tokens = torch.tensor([text[count + step] for count in prompts], device=layers.device)
        logits.append(session.follow(tokens, steps - step)[: len(prompts)].float().clone())
    return list(torch.stack(logits, 1))
