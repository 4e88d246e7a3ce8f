"""What is timed, and how.

Each repetition empties the second-level cache by reading something else, lets the GPU sleep for as long as the CPU
needs to queue everything, and takes CUDA events around the forward and around the backward pass: the times are the
GPU's, of launches one right after another, without what Python costs. The median of the repetitions counts.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "BYTES", "DEVICE", "MODELS", "Case", "Model", "Times", "Variants", "classes", "frozen", "gpu_time", "leaf",
    "measure", "peer", "roofline",
]  # fmt: skip

Variants = dict[str, Callable[..., Any]]

BYTES = 2
"""Of a bf16 element; everything is timed in bf16."""


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama model that decide what its operations cost."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128256


MODELS = {
    "1b": Model(2048, 8192, 32, 8, 64),
    "8b": Model(4096, 14336, 32, 8, 128),
    "70b": Model(8192, 28672, 64, 8, 128),
}


@dataclass(frozen=True)
class Case:
    """One operation at one size, ours and others'.

    Attributes:
        op: the operation, as in ``--ops``.
        model: a key of ``MODELS``.
        shape: the sizes in words.
        make: makes the arguments of all variants; called once for each, so that no variant sees another's leavings.
        variants: name → the function; ``ours`` and whatever it is compared with. ``compile`` is made from ``eager``.
        moved: pass → bytes, each input read once and each output written once.
        flop: pass → floating-point operations.
        passes: the passes to time; ``("forward",)`` where there are no gradients.
        split: whether the work of the two passes is comparable between variants; it is not where one of them makes the
            gradient in its forward pass. Then only their sum is compared.
        compiled: whether to time ``torch.compile`` of ``eager`` too.
        quick: whether ``--quick`` has it.

    Two names among the variants are special: ``floor`` is work that the operation cannot do without, to which its time
    is compared; ``left out`` is subtracted from ours before that.
    """

    op: str
    model: str
    shape: str
    make: Callable[[], tuple[Any, ...]]
    variants: Mapping[str, Callable[..., Any]]
    moved: Mapping[str, int] = field(default_factory=dict)
    flop: Mapping[str, int] = field(default_factory=dict)
    passes: tuple[str, ...] = ("forward", "backward")
    split: bool = True
    compiled: bool = True
    quick: bool = True


@dataclass(frozen=True)
class Times:
    """What one variant took.

    Attributes:
        forward, backward: milliseconds; ``backward`` is None where there are no gradients.
        spread: from the 20th to the 80th percentile of the sums, as a share of the median.
        peak: GiB beyond inputs and gradients.
        first: seconds of the first call, forward and backward, with all that is compiled for it.
    """

    forward: float
    backward: float | None
    spread: float
    peak: float
    first: float

    @property
    def both(self) -> float:
        return self.forward + (self.backward or 0.0)


DEVICE = "cuda"
"""Where the cases' arguments are made."""


def leaf(*shape: int) -> Tensor:
    """Normal numbers in bf16 that want a gradient."""
    return frozen(*shape).requires_grad_()


def frozen(*shape: int) -> Tensor:
    """Normal numbers in bf16 without a gradient."""
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def classes(count: int, *shape: int) -> Tensor:
    """Class numbers."""
    return torch.randint(count, shape, device=DEVICE)


def peer(module: str) -> ModuleType | None:
    """Another library's module, or None where it is not installed; nothing of it is imported unless it is timed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


_flush: dict[torch.device, Tensor] = {}


def _empty_cache() -> None:
    """Fill the second-level cache with clean lines of a tensor that nobody needs."""
    device = torch.device("cuda", torch.cuda.current_device())
    if device not in _flush:
        _flush[device] = torch.ones(1 << 26, device=device)  # 256 MiB
    _flush[device].sum()


def _sleep(milliseconds: float) -> None:
    torch.cuda._sleep(int(milliseconds * 2e6))  # cycles; at a lower clock it is a longer sleep


def _outputs(result: Any) -> list[Tensor]:
    """What has a backward pass."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]


def measure(
    function: Callable[..., Any], arguments: tuple[Any, ...], backward: bool = True, budget: float = 0.4
) -> Times:
    """Time a function of those arguments, and its backward pass, for about ``budget`` seconds, at least 8 times."""
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad] if backward else []
    upstream: list[Tensor] = []

    def run(events: list[torch.cuda.Event] | None) -> None:
        if events:
            events[0].record()
        with torch.set_grad_enabled(bool(leaves)):
            outputs = _outputs(function(*arguments))
        if events:
            events[1].record()
        if not outputs:
            return
        if not upstream:
            upstream.extend(torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outputs)
        if events:
            _empty_cache()
            events[2].record()
        grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)  # a floor has no use for adapters
        if events:
            events[3].record()
        del outputs, grads

    torch.cuda.synchronize()
    began = time.perf_counter()
    run(None)
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    run(None)
    torch.cuda.synchronize()
    gradients = sum(t.numel() * t.element_size() for t in leaves)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run(None)
    queued = (time.perf_counter() - began) * 1e3
    torch.cuda.synchronize()
    total = time.perf_counter() - began
    peak = max(torch.cuda.max_memory_allocated() - before - gradients, 0) / 2**30

    repetitions = int(min(max(budget / total, 8), 60))
    passes: list[tuple[float, float]] = []
    for _ in range(repetitions):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        _empty_cache()
        _sleep(min(1.5 * queued + 0.3, 30.0))
        run(events)
        torch.cuda.synchronize()
        passes.append(
            (events[0].elapsed_time(events[1]), events[2].elapsed_time(events[3]) if upstream else 0.0),
        )
    sums = sorted(f + b for f, b in passes)
    low, middle, high = (sums[int(share * (len(sums) - 1))] for share in (0.2, 0.5, 0.8))
    return Times(
        forward=statistics.median(f for f, _ in passes),
        backward=statistics.median(b for _, b in passes) if upstream else None,
        spread=(high - low) / middle,
        peak=peak,
        first=first,
    )


def gpu_time(function: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds of one call without gradients."""
    return measure(function, arguments, backward=False).forward


def roofline(device: torch.device) -> dict[str, float]:
    """What this card gives here and now: a large copy in TB/s (read and written), a large bf16 product in TFLOP/s."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() * source.element_size() / gpu_time(target.copy_, source) / 1e9
    small = 1 << 26
    copy_128 = 4 * small / gpu_time(target[:small].copy_, source[:small]) / 1e9
    del source, target
    n = 8192
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device=device).unbind()
    return {"copy": copy, "copy of 128 MiB": copy_128, "product": 2 * n**3 / gpu_time(torch.mm, a, b) / 1e9}
