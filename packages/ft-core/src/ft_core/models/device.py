"""Which device to work on, in which number format, and how much memory it has."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from ft_core.models.cgroup import limits

__all__ = ["Device", "count_peak_anew", "host_memory", "peak_memory", "pick_device", "processes_here"]


@dataclass(frozen=True)
class Device:
    """Where a model is put.

    Attributes:
        type: ``cuda``, ``mps`` or ``cpu``.
        name: what the hardware calls itself.
        dtype: the 16-bit format that the hardware computes fast in, or ``float32``.
        memory: its total memory in bytes.
        free: how much of that is free now.
    """

    type: str
    name: str
    dtype: str
    memory: int
    free: int

    def __str__(self) -> str:
        kind = {"cuda": "GPU", "mps": "Apple GPU", "cpu": "CPU"}[self.type]
        return f"{kind} ({self.name}, {self.free / 2**30:.1f} of {self.memory / 2**30:.1f} GiB free) in {self.dtype}"


def pick_device() -> Device:
    """The best device here: a CUDA GPU, else Apple's, else the CPU.

    bfloat16 is taken where the hardware multiplies in it (CUDA 8.0 and later; a CPU with AVX512-BF16, AMX or Arm's
    BF16), float16 on older GPUs, and float32 on other CPUs, where 16-bit products are slower.
    """
    import torch

    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(index)
        dtype = "bfloat16" if torch.cuda.get_device_capability(index) >= (8, 0) else "float16"
        return Device("cuda", torch.cuda.get_device_name(index), dtype, total, free)
    total, free = host_memory()
    if torch.backends.mps.is_available():
        return Device("mps", platform.processor() or "Apple", "float16", total, free)
    return Device("cpu", _processor(), "bfloat16" if _cpu_has_bf16() else "float32", total, free)


def _cpu_has_bf16() -> bool:
    import torch

    try:
        has = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        return False
    return any(bool(has.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16", "sve_bf16"))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else ""
    except OSError:
        name = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name or platform.processor() or platform.machine()}, {cores} core{'s' if cores != 1 else ''}"


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available memory of this machine in bytes, or what a container is allowed where that is less.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    try:
        with open(root / "proc/meminfo", encoding="utf-8") as file:
            sizes = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in file)}
        total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
        for most, left in limits(root):
            total, free = min(total, most), min(free, left)
        return total, free
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    except (AttributeError, ValueError, OSError):
        return 0, 0


def processes_here() -> int:
    """Processes of this training on this machine, as torchrun says; else all that torch's process group has."""
    try:
        return max(int(os.environ["LOCAL_WORLD_SIZE"]), 1)
    except (KeyError, ValueError):
        pass
    distributed = sys.modules.get("torch.distributed")  # whoever has begun a group has imported it
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return int(distributed.get_world_size())


def peak_memory() -> int:
    """Peak bytes so far: allocated on the GPU, or the process's resident size where there is none."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def count_peak_anew() -> None:
    """On a GPU :func:`peak_memory` is from now on that of what follows; elsewhere it stays the process's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
