"""Whether the fast layers compute what transformers' own do: on the model itself, with one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ft_core.fast.layout import at
from ft_core.fast.swap import FastPath
from ft_core.models.modes import modes_kept

__all__ = ["Comparison", "bound", "compare", "trial"]

INT8 = 4 / 127 / 12**0.5
"""The error of what bitsandbytes' 8-bit layers multiply on a GPU, relative to it: a row of activations is rounded to
steps of a 127th of its largest number, some four times the average one; the fast layers don't. It is evenly spread
over a step."""
TRIED = 160
"""Tokens of a trial: from 128 on, products take the way that long rows take."""


@dataclass(frozen=True)
class Comparison:
    """How far the fast layers are from transformers' own on one batch.

    Attributes:
        losses: the fast loss and the plain one.
        gradients: for each trained parameter by name, the relative L2 distance of its gradients. Where the gradient is
            under a thousandth of the largest, it is relative to that: it may be nothing but rounding.
        limit: what they may be at most.
    """

    losses: tuple[float, float]
    gradients: dict[str, float]
    limit: float

    @property
    def mismatch(self) -> str | None:
        """The name of what differs most, if it differs too much: a parameter, or ``loss``."""
        fast, plain = self.losses
        if not math.isclose(fast, plain, rel_tol=self.limit, abs_tol=self.limit):
            return "loss"
        worst = max(self.gradients, key=lambda name: _order(self.gradients[name]), default=None)
        return worst if worst is not None and not self.gradients[worst] <= self.limit else None


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def bound(dtype: torch.dtype, layers: int, terms: int, int8: bool = False) -> float:
    """The largest distance that rounding explains.

    Args:
        dtype: what is computed in. layers: how many a gradient passes. terms: of the longest sum.
        int8: whether transformers' own layers round the inputs of their products to 8 bits.

    Each layer rounds some sixteen results, whose errors of half a unit in the last place are independent, and which are
    sums of up to ``terms`` products added in fp32; the errors of the layers add up as a random walk. Both sides round:
    2 · sqrt(16) · (eps + eps₃₂ · sqrt(terms)) / 2 · sqrt(layers), doubled. To 8 bits one side rounds four inputs of a
    layer: sqrt(4) · INT8 · sqrt(layers), doubled; both are independent of each other.
    """
    each = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(terms)
    return math.hypot(8 * each, 4 * INT8 if int8 else 0.0) * math.sqrt(max(layers, 1))


def compare(
    path: Any, model: nn.Module, batch: dict[str, Any], dtype: torch.dtype | None = None, *,
    layers: int | None = None, terms: int | None = None,
) -> Comparison:  # fmt: skip
    """Loss and gradients of a batch with the fast layers and with them switched off.

    Args:
        path: the fast layers of the model, or another handle with ``on``.
        model: what is called: the model, or what wraps it.
        batch: its arguments, with labels.
        dtype: what autocast computes in; None for no autocast.
        layers, terms: as for :func:`bound`; None for those of a stack of decoder layers.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    with _without_dropout(model), torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
        results = []
        for on in (True, False):
            path.on = on
            try:
                loss = model(**batch).loss
                results.append((loss, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))
            finally:
                path.on = True
    (fast_loss, fast), (plain_loss, plain) = results
    largest = max((float(g.norm()) for g in plain if g is not None), default=0.0)
    distances = {name: _distance(one, two, largest) for name, one, two in zip(parameters, fast, plain, strict=True)}
    computed = dtype or next(iter(model.parameters())).dtype
    if terms is None:  # a batch may be embedded already; its gradients are sums over as many places
        places = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
        terms = max(path.model.config.get_text_config().intermediate_size, places.numel())
    if layers is None:
        layers = len(path.layers) + _before(path)
    rounded = device.type == "cuda" and any(type(m).__name__ == "Linear8bitLt" for m in path.model.modules())
    limit = bound(computed, layers, terms, rounded)
    return Comparison((float(fast_loss), float(plain_loss)), distances, limit)


def _before(path: FastPath) -> int:
    """How many layers there are that gradients reach through the stack's: those of a tower, if any of it is trained.

    They are transformers' own on both sides, but round what comes to them, which differs.
    """
    if path.layout.body is None:
        return 0
    stack = {id(module) for module in at(path.model, path.layout.backbone).modules()}
    lists = [m for m in path.model.modules() if isinstance(m, nn.ModuleList) and id(m) not in stack]
    return sum(len(each) for each in lists if any(p.requires_grad for p in each.parameters()))


def trial(path: FastPath) -> None:
    """Run the fast layers forward and backward on a few tokens; raises whatever they raise on this machine."""
    model = path.model
    backbone = at(model, path.layout.backbone)
    device = next(model.parameters()).device
    dtype = next(backbone.parameters()).dtype
    ids = torch.arange(TRIED, device=device)[None] % model.config.get_text_config().vocab_size
    with _without_dropout(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2):
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        if parameters:
            torch.autograd.grad(hidden.float().sum(), parameters, allow_unused=True)


def _distance(one: Tensor | None, two: Tensor | None, largest: float) -> float:
    if one is None or two is None:
        return 0.0 if one is two else math.inf
    scale = max(float(two.float().norm()), 1e-3 * largest)
    difference = float((one.float() - two.float()).norm())
    return difference / scale if scale else 0.0 if difference == 0 else math.inf


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in training mode, save for its dropouts, which would differ."""
    with modes_kept(model):
        for module in model.modules():
            module.training = not isinstance(module, nn.Dropout)
        yield
