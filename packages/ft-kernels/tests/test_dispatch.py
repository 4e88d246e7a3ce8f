"""What is computed where, and that nothing is imported or launched that need not be."""

from __future__ import annotations

import os
import subprocess
import sys

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
