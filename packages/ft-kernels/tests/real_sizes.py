"""The most memory that the perceptron of a layer of Llama 3.1 8B takes at a time, in JSON. No tensor has any here.

A process of its own, since it lets the package believe that this machine has a Hopper card.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ft_kernels as ft
from ft_kernels import dispatch, tuning

TOKENS, H, INNER, RANK = 4096, 4096, 14336, 16


class Live(TorchDispatchMode):
    """Bytes of what is made inside and is still there, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for tensor in made if isinstance(made, tuple | list) else (made,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def believe() -> None:
    """In a Hopper card whose kernels do nothing."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(ft.__path__, "ft_kernels.")
               if not m.name.endswith("__main__")]  # fmt: skip
    launch = dispatch.launch
    for module in [dispatch, *modules]:
        if vars(module).get("launch") is launch:
            module.launch = lambda *args, **options: None  # type: ignore[attr-defined]
    dispatch._kernels_run_on = lambda device: True  # type: ignore[assignment]
    tuning.family = lambda device: "hopper"  # type: ignore[assignment]
    tuning.multiprocessors = lambda device: 132  # type: ignore[assignment]
    tuning.capability = lambda device: (9, 0)  # type: ignore[assignment]
    tuning.settings = lambda name, device, key, *, default, candidates=(): default  # type: ignore[assignment]
    FakeTensor.data_ptr = lambda self: (  # type: ignore[method-assign]
        self.untyped_storage()._cdata * 64 + self.storage_offset() * self.element_size()
    )


def peaks(form: str, keep: Any) -> list[int]:
    """Bytes of the forward and of the backward pass, beside weights, adapters, input and the gradient from above."""

    def weight(n: int, k: int) -> Any:
        if form != "nf4":
            return torch.empty(n, k, dtype=torch.bfloat16)
        scales = ft.NestedScales(torch.empty(n * k // 64 // 256), torch.empty(256), torch.empty(()), 256)
        codes = torch.empty(n * k // 2, 1, dtype=torch.uint8)
        return ft.NF4Weight(codes, torch.empty(n * k // 64, dtype=torch.uint8), (n, k), 64, scales)

    sizes = [(INNER, H), (INNER, H), (H, INNER)]
    weights: list[Any] = [weight(n, k) for n, k in sizes]
    first, second = weights[:-1], weights[-1]
    if form != "nf4":
        first, second = ft.widen(first, RANK * len(first)), ft.widen(second, RANK)
    a = [torch.empty(RANK, k, requires_grad=True) for _, k in sizes]
    b = [torch.empty(n, RANK, requires_grad=True) for n, _ in sizes]
    norm = ft.Norm(torch.empty(H, dtype=torch.bfloat16), 1e-5)
    x = torch.empty(2, TOKENS // 2, H, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty_like(x)
    block = ft.MLPBlock(norm, first, second, a, b)
    live = Live()
    with live:
        y = block(x, keep=keep)
        forward, live.peak = live.peak, live.bytes
        torch.autograd.grad(y, [x, *a, *b], dy)
    return [forward, live.peak]


def main() -> None:
    believe()
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for case in sys.argv[1:]:
            peaks(*case.split("/"))  # what is made once
            found[case] = peaks(*case.split("/"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
