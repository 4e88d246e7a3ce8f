"""What is computed where, and that nothing is imported or launched that need not be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from ft_kernels import dispatch


def run(code: str) -> None:
    """In a fresh interpreter without triton's own switch, as a user's process is."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


USE = """
import torch, ft_kernels
from ft_kernels.dispatch import launches
logits = torch.randn(3, 7, requires_grad=True)
ft_kernels.cross_entropy(logits, torch.tensor([0, 1, -100])).backward()
layer = ft_kernels.nn.RMSNorm(7)
layer(logits).sum().backward()
assert logits.grad.isfinite().all() and layer.weight.grad.isfinite().all()
assert not launches
"""


def test_a_cpu_tensor_needs_no_triton():
    run(USE + "import sys; assert 'triton' not in sys.modules")


def test_works_where_triton_is_not_installed():
    run("import sys; sys.modules['triton'] = None" + USE)


def test_float64_and_other_devices_are_the_references():
    assert not dispatch.use_triton(torch.ones(2, dtype=torch.float64))
    assert not dispatch.use_triton(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not dispatch.use_triton(torch.ones(2, device="meta"))


def test_fp32_is_a_kernels(device):
    pytest.importorskip("triton")
    assert dispatch.use_triton(torch.ones(2, device=device), None, torch.ones(2, device=device, dtype=torch.long))


@pytest.mark.parametrize(
    ("view", "layout", "copied"),
    [
        (lambda t: t, (60, 0, 7), False),
        (lambda t: t[:, 1:], (4, 35, 7), False),
        (lambda t: t[:, :1], (12, 0, 35), False),
        (lambda t: t[..., 2:5], (60, 0, 7), False),
        (lambda t: t.view(3, 4, 5, 7)[:, 1:, 2:], (45 // 5, 0, 0), True),
        (lambda t: t[..., ::2], (60, 0, 4), True),
        (lambda t: t[:1, :1].expand(12, 5, 7), (60, 0, 0), False),
        (lambda t: t[:, :, :1], (60, 0, 7), False),
        (lambda t: t[0, 0], (1, 0, 0), False),
    ],
)
def test_rows(view, layout, copied):
    tensor = view(torch.arange(12 * 5 * 7).view(12, 5, 7))
    rows = dispatch.Rows(tensor)
    assert (rows.tensor.data_ptr() != tensor.data_ptr()) == copied
    inner, outer_stride, inner_stride = rows.layout
    if not copied:
        assert rows.layout == layout
    storage = rows.tensor.as_strided((rows.tensor.untyped_storage().nbytes() // 8,), (1,), 0)
    start = rows.tensor.storage_offset()
    for row, expected in enumerate(tensor.reshape(-1, tensor.shape[-1])):
        at = start + (row // inner) * outer_stride + (row % inner) * inner_stride
        assert torch.equal(storage[at : at + tensor.shape[-1]], expected)
    assert rows.count == tensor.numel() // tensor.shape[-1]


class Noted:
    """What a launch asks of a triton kernel, written down."""

    pre_run_hooks = ()

    def __init__(self, broken=False):
        self.compiled, self.run, self.broken = [], [], broken

    def warmup(self, *args, grid, **meta):
        self.compiled.append((args, grid, meta))
        if self.broken:
            raise RuntimeError("it cannot be compiled")

    def __getitem__(self, grid):
        return lambda *args, **meta: self.run.append((args, grid, meta))


def test_a_launch_may_be_compiled_instead():
    kernel, x, odd, cpu = Noted(), torch.ones(16), torch.ones(17)[1:], torch.device("cpu")
    before = dispatch.launches["noted"]
    with dispatch.CompileAhead(2):
        dispatch.launch("noted", kernel, (3,), cpu, x, odd, None, 16, 0.5, BLOCK=8)
        dispatch.launch("noted", kernel, (5,), cpu, torch.zeros(32), odd, None, 32, 0.25, BLOCK=8)  # the same to triton
        dispatch.launch("noted", kernel, (3,), cpu, x, odd, None, 1, 0.5, BLOCK=8)
        coming = [future for key, future in dispatch._coming.items() if key[0] == id(kernel)]
    for future in coming:
        future.result(10)
    assert sorted(kernel.compiled, key=str) == [
        ((torch.float32, odd, None, 1, 0.5), (3,), {"BLOCK": 8}),
        ((torch.float32, odd, None, 16, 0.5), (3,), {"BLOCK": 8}),
    ]
    assert not kernel.run
    assert dispatch.launches["noted"] == before
    dispatch.launch("noted", kernel, (3,), cpu, x, odd, None, 16, 0.5, BLOCK=8)
    assert len(kernel.run) == 1
    assert dispatch.launches["noted"] == before + 1


def test_a_launch_waits_for_its_own_kernel_only():
    class Slow(Noted):
        def warmup(self, *args, grid, **meta):
            begun.set()
            assert go_on.wait(30)
            super().warmup(*args, grid=grid, **meta)

    begun, go_on, cpu = threading.Event(), threading.Event(), torch.device("cpu")
    kernels = [Slow(), Noted()]
    with dispatch.CompileAhead(1):
        for kernel in kernels:
            dispatch.launch("noted", kernel, (1,), cpu)
    first, second = (next(key for key in dispatch._coming if key[0] == id(kernel)) for kernel in kernels)
    assert begun.wait(30)
    waiting = [threading.Thread(target=dispatch._wait_for, args=(key,), daemon=True) for key in (first, second)]
    for thread in waiting:
        thread.start()
    waiting[1].join(30)
    assert not waiting[1].is_alive(), "it stood in line behind another"
    assert waiting[0].is_alive()
    go_on.set()
    waiting[0].join(30)
    assert not waiting[0].is_alive()
    assert len(kernels[0].compiled) == 1
    for thread in threading.enumerate():
        if thread.name == "ft-compile":
            thread.join(30)
    assert not kernels[1].compiled  # its launch does it


CHILD = """
import sys, time, torch
from ft_kernels import dispatch
class Slow:
    pre_run_hooks = ()
    def warmup(self, *args, **meta):
        print("compiled", flush=True)
        time.sleep(0.2)
kernels = [Slow() for _ in range(40)]
with dispatch.CompileAhead(2):
    for kernel in kernels:
        dispatch.launch("slow", kernel, (1,), torch.device("cpu"))
sys.exit("it fails early")
"""


def test_a_program_that_ends_leaves_what_stands_in_line():
    done = subprocess.run([sys.executable, "-c", CHILD], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "it fails early"), done
    assert done.stdout.count("compiled") <= 20, done.stdout


def test_other_threads_launch_meanwhile():
    kernel, cpu = Noted(), torch.device("cpu")
    with dispatch.CompileAhead(1):
        other = threading.Thread(target=dispatch.launch, args=("noted", kernel, (1,), cpu, torch.ones(2)))
        other.start()
        other.join()
    assert len(kernel.run) == 1
    assert not kernel.compiled


def test_what_cannot_be_compiled_ahead_is_waited_for_and_left_to_the_launch():
    kernel, x, cpu = Noted(broken=True), torch.ones(2), torch.device("cpu")
    with dispatch.CompileAhead(1):
        dispatch.launch("noted", kernel, (1,), cpu, x)
    (key,) = [key for key in dispatch._coming if key[0] == id(kernel)]
    assert isinstance(dispatch._coming[key].exception(30), RuntimeError)
    dispatch._wait_for(key)
    assert len(kernel.compiled) == 1
    assert key not in dispatch._coming
    dispatch._wait_for(key)  # nothing to wait for
