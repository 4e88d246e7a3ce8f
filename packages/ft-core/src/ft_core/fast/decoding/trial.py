"""Whether the fast layers write what transformers would, on this machine: tried on a few tokens before an answer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
    from those of transformers' own layers, relative L2, may be three times what transformers' own are apart when they
    read the same text at once and token by token: what rounding does in this model is measured. Where the same products
    are computed both ways that is next to nothing, and says nothing of layers that round elsewhere; so it is reckoned.

    Args:
        layers: of the model.
        model: the model, with PEFT's wrapping if there is one, in evaluation mode.
    """
    vocabulary = layers.embedding.shape[0]
    text = [(7 * i + 3) % vocabulary for i in range(TOKENS)]
    with _transformers_layers(model):
        expected, by_token = _plain(model, torch.tensor([text], device=layers.device))
    limit = 3 * max(_distance(by_token, expected), _least(layers))
    for prompts in PROMPTS:
        try:
            found = _written(layers, text, prompts)
        except Exception as error:
            if is_memory_error(error):
                raise
            return f"they fail on this machine ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
        for count, logits in zip(prompts, found, strict=True):
            distance = _distance(logits, expected[count - 1 :][: len(logits)])
            if not distance <= limit:
                return f"their logits differ from transformers' own by {distance:.2g} (rounding explains {limit:.2g})"
    return None


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _least(layers: Layers) -> float:
    """What logits are apart, by rounding alone, where the same layers round at other places.

    One and a half units in the last place, and the rounding of the sums in fp32 that results are: random models of 3 to
    32 layers were 1.2 to 3.9 units apart, of which this and the factor of three allow four and a half.
    """
    terms = max(product.sizes[0] for layer in layers.layers for product in layer.products)
    least = 1.5 * torch.finfo(layers.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(terms)
    if any(product.kind == "Int8Weight" for layer in layers.layers for product in layer.products):
        # bitsandbytes rounds the inputs of its 8-bit layers to 8 bits, four times a layer, which the fast layers don't.
        least = max(least, 2**-7 * math.sqrt(4 * len(layers.layers)))
    return least


@contextlib.contextmanager
def _transformers_layers(model: Any) -> Iterator[None]:
    """The model computes by transformers' layers in the body."""
    path = fast_path_of(model)
    was_on = path is not None and path.on
    if path is not None:
        path.on = False
    try:
        yield
    finally:
        if path is not None:
            path.on = was_on


def _plain(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[tokens, V]`` by transformers' layers: of all tokens at once, and one token after the other."""
    at_once: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    cache, steps = None, []
    for i in range(ids.shape[1]):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0].float())
    return at_once, torch.cat(steps)


def _written(layers: Layers, text: list[int], prompts: tuple[int, ...]) -> list[Tensor]:
    """For each prompt, logits ``[tokens, V]`` from its last token on: as many steps as the longest one leaves."""
    session = Session(layers, len(prompts), TOKENS)
    steps = TOKENS - max(prompts)
    logits = [session.begin([text[:count] for count in prompts]).float().clone()]
    for step in range(steps):
        tokens = torch.tensor([text[count + step] for count in prompts], device=layers.device)
        logits.append(session.follow(tokens, steps - step)[: len(prompts)].float().clone())
    return list(torch.stack(logits, 1))
