"""Compile every kernel for every card, without a GPU: a program of its own, because triton must not be interpreting.

Each case of ``compile_cases.py`` is called on CPU tensors. In place of launching, the kernel is compiled for one card
exactly as a launch on it would (same specializations, same settings), and a JSON line says what it needs:

    python compile_targets.py [--targets 75,90] [--ops rms_norm] [--jobs 2]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo  # comes with the first call of any custom operation; here, once for all processes
import triton
import triton.language as tl
from compile_cases import CASES, Make
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ft_kernels import dispatch, tuning

# Multiprocessors of a card of each kind: T4, A100, RTX 3090, RTX 4090, H100, B200.
MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148}
HALF, FULL = torch.bfloat16, torch.float32
# bf16 and fp16 take the same tiles and differ in conversions alone, so one of them will do where there is bf16
# arithmetic. fp32 where it takes other tiles: 8.9 is as 8.6, and 10.0 as 9.0.
DTYPES = {
    75: (torch.float16, HALF, FULL), 80: (HALF, FULL), 86: (HALF, FULL), 89: (HALF,), 90: (HALF, FULL), 100: (HALF,),
}  # fmt: skip


@triton.jit
def _nothing(x):
    tl.store(x, 0.0)


@dataclass
class Properties:
    """Of ``torch.cuda.get_device_properties``, what launch settings may look at."""

    multi_processor_count: int
    shared_memory_per_block_optin: int
    major: int
    minor: int
    max_threads_per_multi_processor: int = 1024
    regs_per_multiprocessor: int = 65536
    L2_cache_size: int = 4 << 20
    total_memory: int = 16 << 30
    warp_size: int = 32


class Driver:
    """What triton asks of a GPU's driver before a launch."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def pretend(target: int) -> None:
    """Make this process believe that CPU tensors are on such a card."""
    capability = divmod(target, 10)
    triton.runtime.driver.set_active(Driver(target))
    dispatch._kernels_run_on = lambda device: True
    tuning.capability = lambda device: capability
    tuning.multiprocessors = lambda device: MULTIPROCESSORS[target]
    properties = Properties(MULTIPROCESSORS[target], tuning.shared_memory(torch.device("cpu")), *capability)
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties
    # Nothing writes the outputs, and some are read as indices.
    plain = dispatch.allocate
    dispatch.allocate = lambda *args: plain(*args).zero_()


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, and bytes a thread in memory for want of them, read from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    return {"registers": int(found[0]), "spilled": int(found[1])}


def compile_op(task: tuple[int, int]) -> list[dict[str, Any]]:
    target, index = task
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    pretend(target)
    dtype = torch.float32

    def compile_instead(name: str, kernel: Any, grid: Any, device: Any, *args: Any, **meta: Any) -> None:
        line = {"target": target, "op": CASES[index].__name__, "dtype": str(dtype), "name": name}
        line["kernel"] = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # triton prints what an assembler refuses
                compiled = kernel.warmup(*args, grid=grid, **meta)
            line |= {"threads": compiled.metadata.num_warps * 32, "shared": compiled.metadata.shared}
            line |= resources(compiled)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
        if line not in lines:
            lines.append(line)

    dispatch.launch = compile_instead
    for dtype in DTYPES[target]:
        try:
            CASES[index](Make(dtype, "cpu"))
        except Exception as error:  # the case itself, or the operation's Python
            line = {"target": target, "op": CASES[index].__name__, "dtype": str(dtype)}
            lines.append({**line, "error": f"{type(error).__name__}: {error}"[:2000]})
    return lines


def supported(target: int) -> str | None:
    """Why this triton does not compile for the target, or None."""
    try:
        source = ASTSource(fn=_nothing, signature={"x": "*fp32"}, constexprs={})
        with contextlib.redirect_stdout(io.StringIO()):
            triton.compile(source, target=GPUTarget("cuda", target, 32))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(map(str, MULTIPROCESSORS)))
    parser.add_argument("--ops", default="")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    options = parser.parse_args()
    targets = [int(word) for word in options.targets.split(",")]
    reasons = {target: supported(target) for target in targets}
    for target, reason in reasons.items():
        if reason:
            print(json.dumps({"target": target, "skipped": reason}))
    wanted = options.ops.split(",") if options.ops else [case.__name__ for case in CASES]
    tasks = [
        (target, index)
        for index, case in reversed(list(enumerate(CASES)))  # the last ones take longest
        if case.__name__ in wanted
        for target in targets
        if not reasons[target]
    ]
    # A process for each task: what a module remembers of its device is then of the right one.
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for lines in pool.imap_unordered(compile_op, tasks, chunksize=1):
            for line in lines:
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
