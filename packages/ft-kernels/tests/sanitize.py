"""One small call of every operation, forward and backward, for compute-sanitizer on a machine with a GPU:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --kernel-regex-exclude kns=nvjet \
        --error-exitcode 1 python sanitize.py [OP ...] [--float-products]

The kernels left out are cuBLAS's own products for Hopper, whose hand-over by barriers racecheck takes for a race. Some
versions break off at them even so ("failed to handle a hardware exception", whatever is left out): then products of 16
bits can be computed in float32, whose kernels are others.
Without the caching allocator every tensor is an allocation of its own, so that a stray access leaves it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from compile_cases import CASES, Make
from torch.utils._python_dispatch import TorchDispatchMode

from ft_kernels.dispatch import launches

FLAG = "--float-products"
aten = torch.ops.aten
PRODUCTS = {getattr(packet, name) for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
            for name in packet.overloads()} | {aten.addmm_.default, aten.baddbmm_.default}  # fmt: skip


class FloatProducts(TorchDispatchMode):
    """Products of 16 bits are computed in float32 and rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in PRODUCTS or args[0].dtype == torch.float32:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        out = kwargs.pop("out", args[0] if name.endswith("_") else None)
        dtype = next((x for x in args if isinstance(x, torch.dtype)), kwargs.pop("out_dtype", args[0].dtype))
        numbers = [x.float() if isinstance(x, torch.Tensor) else x for x in args if not isinstance(x, torch.dtype)]
        result = getattr(aten, name.rstrip("_")).default(*numbers, **kwargs).to(dtype)
        return result if out is None else out.copy_(result)


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitize.py: no CUDA device here, so there is nothing to check", file=sys.stderr)
        return 2
    words = sys.argv[1:]
    if instead := FLAG in words:
        words.remove(FLAG)
    unknown = set(words) - {case.__name__ for case in CASES}
    if unknown:
        print(f"sanitize.py: {', '.join(sorted(unknown))} unknown; there are {', '.join(c.__name__ for c in CASES)}")
        return 2
    torch.autograd.set_multithreading_enabled(False)
    with FloatProducts() if instead else contextlib.nullcontext():
        return run(words)


def run(names: list[str]) -> int:
    """The cases of these names, or all."""
    failed = 0
    for case in CASES:
        if names and case.__name__ not in names:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            before = launches.copy()
            try:
                case(Make(dtype, "cuda"))
                torch.cuda.synchronize()
            except Exception as error:
                failed += 1
                print(f"{case.__name__} {dtype}: {type(error).__name__}: {error}")
            else:
                print(f"{case.__name__} {dtype}: {dict(launches - before)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
