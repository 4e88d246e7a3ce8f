"""Loss and log-probability from hidden states and a head, at sizes at which the logits are 2 GB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import ft_kernels as ft
from ft_kernels.bench.harness import MODELS, Case, Model, Variants, classes, frozen, leaf, peer

__all__ = ["cases"]

TOKENS = 8192


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """``linear_cross_entropy`` with a frozen and a trained head, and ``linear_logprob``, at ``TOKENS`` rows."""
    for name in models:
        yield _linear_cross_entropy(name, MODELS[name], trained=False)
        yield _linear_cross_entropy(name, MODELS[name], trained=True)
        yield _linear_logprob(name, MODELS[name])


def _frozen_products(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What cannot be saved: the logits, and with a gradient as large as they are, that of hidden."""
    rows = 1024  # as many logits at a time as the operation itself would hold
    gradient = torch.empty_like(hidden)
    for start in range(0, hidden.shape[0], rows):
        logits = hidden[start : start + rows] @ weight.t()
        torch.mm(logits, weight, out=gradient[start : start + rows])
    return gradient


def _linear_cross_entropy(name: str, model: Model, *, trained: bool) -> Case:
    h, v = model.hidden, model.vocabulary
    product = 2 * TOKENS * h * v
    # Whoever trains a head has room for its gradient in fp32 too.
    memory = 2**32 if trained else 2**30
    variants: Variants = {
        "ours": lambda *arguments: ft.linear_cross_entropy(*arguments, max_memory=memory),
        "eager": lambda hidden, weight, targets: F.cross_entropy((hidden @ weight.t()).float(), targets),
    }
    liger = peer("liger_kernel.functional")
    if liger is not None:
        variants["liger"] = lambda hidden, weight, targets: liger.fused_linear_cross_entropy(hidden, weight, targets)[0]
    if not trained:
        variants["floor"] = torch.no_grad()(_frozen_products)
    return Case(
        "linear_cross_entropy" if not trained else "linear_cross_entropy_trained", name,
        f"{TOKENS} x {h} x {v}, {memory >> 30} GiB",
        make=lambda: (leaf(TOKENS, h), _head(v, h).requires_grad_(trained), classes(v, TOKENS)),
        variants=variants,
        flop={"forward": product, "backward": (2 if trained else 1) * product},
        split=False,
        quick=not trained,
    )  # fmt: skip


def _head(v: int, h: int) -> Tensor:
    return frozen(v, h).mul_(h**-0.5)


def _linear_logprob(name: str, model: Model) -> Case:
    h, v = model.hidden, model.vocabulary
    product = 2 * TOKENS * h * v

    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.t()).float()
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    return Case(
        "linear_logprob", name, f"{TOKENS} x {h} x {v}",
        make=lambda: (leaf(TOKENS, h), _head(v, h), classes(v, TOKENS)),
        variants={"ours": ft.linear_logprob, "eager": eager},
        flop={"forward": product, "backward": product},
        split=False,
    )  # fmt: skip
