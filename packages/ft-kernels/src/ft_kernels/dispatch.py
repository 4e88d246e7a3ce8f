"""The one place that decides between a Triton kernel and the torch reference, and through which kernels are launched.

Triton is imported when the first kernel is launched, never before: on a machine without a GPU it is not needed at all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ft_kernels import tuning

__all__ = [
    "CompileAhead",
    "Rows",
    "allocate",
    "cdiv",
    "interpreting",
    "launch",
    "launches",
    "native",
    "power_of_2",
    "use_triton",
]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

launches: Counter[str] = Counter()
"""How often each kernel was launched in this process, by name; tests read it to know that a kernel really ran."""


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def interpreting() -> bool:
    """Whether triton's interpreter is on (its own switch, ``TRITON_INTERPRET=1``, set before this module is imported).

    Kernels then run on CPU tensors, far too slowly for anything but testing.
    """
    return _INTERPRETING


def native() -> bool:
    """Whether instructions of NVIDIA's cards may be named in a kernel."""
    return not interpreting() and torch.version.hip is None


@cache
def _device_is_able(device: torch.device) -> bool:
    # Triton's code generator starts at compute capability 7.0; AMD's cards (no CUDA version) have other numbers.
    return torch.version.cuda is None or torch.cuda.get_device_capability(device) >= (7, 0)


def _kernels_run_on(device: torch.device) -> bool:
    if not _TRITON_INSTALLED:
        return False
    if device.type == "cuda":
        # torch.compile traces this function; it asks for the same capability as we do.
        return _INTERPRETING or torch.compiler.is_compiling() or _device_is_able(device)
    return device.type == "cpu" and _INTERPRETING


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether a kernel computes this: True for fp16, bf16 and fp32 tensors on a CUDA (or ROCm) device with triton.

    Anything else (float64, CPU, MPS, a card older than compute capability 7.0, no triton) is the reference's.
    """
    given = [t for t in tensors if t is not None]
    if any(t.is_floating_point() and t.dtype not in KERNEL_DTYPES for t in given):
        return False
    return _kernels_run_on(given[0].device)


def cdiv(n: int, d: int) -> int:
    """How many times d goes into n, the last time perhaps in part (triton's own takes ten times as long)."""
    return -(-n // d)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory for a kernel to write. Every output comes from here, so that tests can poison it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def launch(name: str, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """Launch a Triton kernel on the current stream of the tensors' device, current or not, and count it.

    A layer makes some thirty launches, so what a launch costs the host is what bounds small batches. Triton looks at
    each argument and option anew; a kernel that it has compiled for arguments like these is found here by less.
    """
    compiler = _ahead.compiler
    if compiler is not None:
        compiler.add(kernel, grid, device, args, meta)
        return
    launches[name] += 1
    if device.type != "cuda" or not native() or kernel.pre_run_hooks:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*args, **meta)
        return
    elsewhere = torch.cuda.current_device() != device.index
    with torch.cuda.device(device) if elsewhere else _NOTHING, tuning.trial(name, device):
        key = _key(kernel, device, args, meta)
        found = _compiled.get(key)
        if found is None:
            _wait_for(key)
            compiled = kernel[grid](*args, **meta)
            names = kernel.arg_names[len(args) :]
            if all(parameter in meta for parameter in names):
                _compiled[key] = (compiled, [meta[parameter] for parameter in names])
            return
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _key(kernel: Any, device: torch.device, args: Sequence[Any], meta: dict[str, Any]) -> tuple[Any, ...]:
    return (id(kernel), device.index, *meta.values(), *map(_trait, args))


class CompileAhead:
    """Compiles kernels in threads of its own: inside ``with``, this thread's launches are compiled instead of run.

    A step of training launches some thirty kernels one after another, and each is compiled when it is first launched;
    with what they would be launched with known, they can be compiled side by side while something else is done. What
    a launch would have written stays as it is, so nothing that is computed inside means anything. A launch outside
    waits for its kernel if that is being compiled; one that still stands in line, or could not be compiled, is compiled
    there, and fails there. When the program ends, what stands in line is left.

    Args:
        threads: how many compile at once.

    Backward passes run in threads of their own, which know nothing of this: there, use
    ``torch.autograd.set_multithreading_enabled(False)``.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        # Neither a pool's threads, for which Python waits until they have done all that is in line, nor daemons, which
        # it ends inside the compiler, with the program.
        self._threads = [threading.Thread(target=self._work, name="ft-compile") for _ in range(threads)]

    def add(self, kernel: Any, grid: tuple[int, ...], device: torch.device, args: Any, meta: dict[str, Any]) -> None:
        """Compile a kernel for arguments like these; at once if it is not being compiled already."""
        key = _key(kernel, device, args, meta)
        if key not in _coming and key not in _compiled:
            # A dtype stands for a tensor of it; memory would be held as long as a tensor itself waits here.
            kinds = [a.dtype if isinstance(a, Tensor) and a.data_ptr() % 16 == 0 else a for a in args]
            _coming[key] = Future()
            self._jobs.put((_coming[key], (kernel, grid, device, kinds, meta)))

    def _work(self) -> None:
        while threading.main_thread().is_alive():
            try:
                job = self._jobs.get(timeout=1)
            except queue.Empty:
                continue
            if job is None:
                return
            future, given = job
            if future.set_running_or_notify_cancel():
                try:
                    _compile(*given)
                    future.set_result(None)
                except BaseException as error:  # whoever launches it meets it again
                    future.set_exception(error)

    def __enter__(self) -> CompileAhead:
        for thread in self._threads:
            thread.start()
        _ahead.compiler = self
        return self

    def __exit__(self, *_: object) -> None:
        _ahead.compiler = None
        for _thread in self._threads:
            self._jobs.put(None)  # behind all that is in line


class _Ahead(threading.local):
    """Whether this thread's launches are only compiled."""

    compiler: CompileAhead | None = None


_ahead = _Ahead()
_coming: dict[tuple[Any, ...], Future[None]] = {}
"""By key, as in ``_compiled``: what is being compiled, or was and has not been launched since."""


def _compile(kernel: Any, grid: tuple[int, ...], device: torch.device, kinds: list[Any], meta: dict[str, Any]) -> None:
    """Compile a kernel, what calls it (C, compiled too), and load both."""
    if device.type == "cuda":
        from triton.runtime import driver

        torch.cuda.set_device(device)  # of this thread
        with _starting:
            driver.active.get_current_device()  # the first time, this compiles and loads triton's own part of C
    compiled = kernel.warmup(*kinds, grid=grid, **meta)
    if device.type == "cuda":
        compiled[(*grid, 1, 1)[:3]]  # loads; called, it would launch


_starting = threading.Lock()


def _wait_for(key: tuple[Any, ...]) -> None:
    coming = _coming.pop(key, None)
    if coming is not None and not coming.cancel():  # one that stands in line is compiled sooner by its launch
        wait([coming])


_NOTHING = contextlib.nullcontext()
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
"""By kernel, device, options and the arguments' traits: what triton compiled, and its constants in order."""


def _trait(argument: Any) -> Any:
    """What triton compiles a kernel for, of an argument: a dtype and 16-byte alignment, or facts about a number."""
    kind = type(argument)
    if kind is int:
        fits = -(2**31) <= argument < 2**31
        return (1 if argument == 1 else 2 if argument % 16 == 0 else 3) + (0 if fits else 3)
    if isinstance(argument, Tensor):
        return argument.dtype if argument.data_ptr() % 16 == 0 else (argument.dtype,)
    return argument if argument is None else kind


class Rows:
    """A tensor ``[..., n]`` as rows; row r starts at ``(r // inner) * outer_stride + (r % inner) * inner_stride``.

    Two strides cover what models hand over without a copy (a slice of the sequence, of the last dimension or of packed
    heads); a tensor that needs more, or whose last dimension is not contiguous, is copied.

    Attributes:
        tensor: the tensor, or its contiguous copy.
        count: the number of rows.
        layout: ``(inner, outer_stride, inner_stride)``, in elements.
    """

    def __init__(self, tensor: Tensor) -> None:
        layout = _layout(tensor)
        if layout is None:
            tensor = tensor.contiguous()
            layout = _layout(tensor)
            assert layout is not None
        self.tensor = tensor
        self.layout = layout
        self.count = tensor.numel() // tensor.shape[-1] if tensor.shape[-1] else 0


def _layout(tensor: Tensor) -> tuple[int, int, int] | None:
    if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.shape[0] > 1:
        return tensor.shape[0], 0, tensor.stride(0)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    merged: list[tuple[int, int]] = []  # (size, stride), innermost first
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    inner, inner_stride = merged[0] if merged else (1, 0)
    outer_stride = merged[1][1] if len(merged) == 2 else 0
    return max(inner, 1), outer_stride, inner_stride
