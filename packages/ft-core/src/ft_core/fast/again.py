"""What a layer keeps between forward and backward, by choice: all, its inputs, its input alone, or that on the host.

A layer that is computed again is one operation to autograd, whose inputs are the layer's input and its parameters:
their gradients come out of it as out of the layer itself, so accumulation, hooks and DistributedDataParallel see no
difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ft_core.fast.offload import HostMemory

__all__ = ["CHOICES", "Choice", "compute_by_choice", "in_words", "without_checkpointing"]

Choice = Literal["keep", "inputs", "recompute", "offload", "offload-input"]
"""What a layer keeps.

- ``keep``: what backward wants, but the norms.
- ``inputs``: its halves' inputs and the attention's output; the products for q, k, v, gate and up are computed again.
- ``recompute``: its input; all but its last product is computed again.
- ``offload``: what ``inputs`` keeps, in host memory.
- ``offload-input``: what ``recompute`` keeps, in host memory: a third of it.

Where a layer's halves are no single operations, ``inputs`` is ``recompute``, and ``offload`` is ``offload-input``.
"""
CHOICES: tuple[Choice, ...] = ("keep", "inputs", "recompute", "offload", "offload-input")


def compute_by_choice(
    choice: Choice, compute: Callable[..., Tensor], x: Tensor, able: bool, trained: Callable[[], Sequence[Tensor]],
    host: HostMemory,
) -> Tensor:  # fmt: skip
    """A layer's output, with a graph that keeps what the choice says.

    Args:
        compute: from x to the output. Its keyword ``keep`` is what the halves keep; ``answer=False`` says that the
            output's numbers are not wanted, only its graph.
        x: ``[B, S, H]``.
        able: whether the layer's halves are one operation each.
        trained: gives all that compute differentiates beside x.
        host: where offloaded tensors wait.
    """
    if choice == "keep" or not torch.is_grad_enabled():
        return compute(x)
    if able:
        if choice == "inputs":
            return compute(x, keep="inputs")
        if choice == "offload":
            with host.layer():
                return compute(x, keep="inputs")
    parameters = trained()
    if not x.requires_grad and not parameters:
        return compute(x)
    with host.layer() if choice in ("offload", "offload-input") else contextlib.nullcontext():
        out: Tensor = _Again.apply(compute, x, *parameters)  # type: ignore[no-untyped-call]
    return out


@contextlib.contextmanager
def without_checkpointing(layers: Sequence[Any]) -> Iterator[None]:
    """transformers' checkpointing of these layers, which is on, is off in the body.

    It is a flag of the instance, which the layer's call looks at (in some versions of transformers its own forward).
    """
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


class _Again(torch.autograd.Function):
    """A function whose graph is made in backward."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.state = _State(x.device)
        ctx.save_for_backward(x, *parameters)
        # With a graph, whose tensors are dropped as it is made: without one, the attention could be another kernel.
        with torch.enable_grad(), saved_tensors_hooks(_drop, _never):
            return compute(x.detach().requires_grad_(), keep="inputs").detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        with ctx.state.again(), torch.enable_grad():
            y = ctx.compute(x, keep="most", answer=False)
        needs = ctx.needs_input_grad[1:]
        wanted = [t for t, need in zip((x, *parameters), needs, strict=True) if need]
        made = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        return None, *(next(made) if need else None for need in needs)


def _drop(tensor: Tensor) -> None:
    return None


def _never(packed: None) -> Tensor:
    raise RuntimeError("the graph of a layer's first computation is used; it is computed again for backward")


class _State:
    """Random numbers and autocast as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._dtype = torch.get_autocast_dtype(device.type)
        self._enabled = torch.is_autocast_enabled(device.type)
        self._cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The body runs in that state, and leaves the state of now as it is."""
        with (
            torch.random.fork_rng([] if self._own is None else [self._device]),
            torch.autocast(self._device.type, self._dtype, self._enabled, self._cache),
        ):
            torch.set_rng_state(self._cpu)
            if self._own is not None:
                torch.cuda.set_rng_state(self._own, self._device)
            yield


def in_words(choices: Sequence[Choice]) -> str:
    """What layers do, such as ``2 of 4 layers kept, 2 of 4 layers computed again``."""
    counts = {choice: sum(c == choice for c in choices) for choice in CHOICES}
    words = {
        "keep": "kept", "inputs": "partly computed again", "recompute": "computed again", "offload": "offloaded",
        "offload-input": "computed again from offloaded inputs",
    }  # fmt: skip
    return ", ".join(f"{count} of {len(choices)} layers {words[choice]}" for choice, count in counts.items() if count)
